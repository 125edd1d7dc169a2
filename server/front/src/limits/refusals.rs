//! Reasons of refusals.

/// Why a peer was refused. The names are values of the metric's label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// A connection beyond the limit of connections.
    Connections,
    /// A connection beyond the limit of its address.
    AddressConnections,
    /// An idle connection, or one without a known caller, that was closed for a new one.
    Evicted,
    /// A connection could not be accepted, because file descriptors had run out.
    OpenFiles,
    /// A connection did not begin to speak HTTP/2 in time.
    Handshake,
    /// A connection did not answer a ping in time.
    Silent,
    /// A connection sent too many frames outside calls.
    ControlFrames,
    /// A connection broke HTTP/2's rules, or h2's own limits.
    Protocol,
    /// A call beyond the limit of all calls or of its caller, or while Python has too many new calls to take.
    Calls,
    /// A call of an unknown caller beyond the limit of such calls.
    UnknownCalls,
    /// A health check beyond the limit of health checks.
    HealthCalls,
    /// A health watch beyond the limit of watches.
    Watches,
    /// A message that took too long to arrive.
    SlowMessage,
    /// A compressed message that is not one stream, or inflates to too many bytes.
    Compressed,
    /// A call whose headers are too large.
    Headers,
    /// A call, because messages and replies use too much memory.
    Memory,
    /// A call whose client did not read its replies in time.
    UnreadReplies,
}

pub const REFUSALS: [(Refusal, &str); 17] = [
    (Refusal::Connections, "connections"),
    (Refusal::AddressConnections, "address_connections"),
    (Refusal::Evicted, "evicted"),
    (Refusal::OpenFiles, "open_files"),
    (Refusal::Handshake, "handshake"),
    (Refusal::Silent, "silent"),
    (Refusal::ControlFrames, "control_frames"),
    (Refusal::Protocol, "protocol"),
    (Refusal::Calls, "calls"),
    (Refusal::UnknownCalls, "unknown_calls"),
    (Refusal::HealthCalls, "health_calls"),
    (Refusal::Watches, "watches"),
    (Refusal::SlowMessage, "slow_message"),
    (Refusal::Compressed, "compressed"),
    (Refusal::Headers, "headers"),
    (Refusal::Memory, "memory"),
    (Refusal::UnreadReplies, "unread_replies"),
];

impl Refusal {
    pub fn name(self) -> &'static str {
        REFUSALS.iter().find(|(why, _)| *why == self).map_or("", |(_, name)| name)
    }
}
