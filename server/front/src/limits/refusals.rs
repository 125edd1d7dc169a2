//! Reasons of refusals.

/// Why a peer was refused something. The names are those of the metric's label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// A connection: there are as many as may be.
    Connections,
    /// The same, from its address.
    AddressConnections,
    /// A connection that did nothing, or whose callers were not known, for a new one.
    Evicted,
    /// A connection could not be accepted, because file descriptors had run out.
    OpenFiles,
    /// A connection did not begin to speak HTTP/2 in time.
    Handshake,
    /// A connection did not answer a ping in time.
    Silent,
    /// A connection sent very many frames that carry no call.
    ControlFrames,
    /// A connection broke HTTP/2's rules, or h2's own limits.
    Protocol,
    /// A call: there are as many as may be, of all or of this caller, or Python has not looked at many.
    Calls,
    /// A call whose caller is not known: there are as many of these as may be.
    UnknownCalls,
    /// A call that asks how the server is, likewise.
    HealthCalls,
    /// The same, for as long as the client likes.
    Watches,
    /// A message that took too long to come.
    SlowMessage,
    /// A compressed message that is not one stream, or becomes too large.
    Compressed,
    /// A call whose headers are too large.
    Headers,
    /// A call, because too many bytes are in memory.
    Memory,
    /// A call whose replies nobody took for too long.
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
