//! Limits for clients, which Python sets.

use crate::messages::grpc::Status;
use crate::method::Method;
use std::collections::HashMap;
use std::time::Duration;

/// The limits.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Limit of a message, inflated or not.
    pub message_bytes: usize,
    /// Limit of a message to a method that needs no authentication.
    pub open_message_bytes: usize,
    /// Concurrent connections. Beyond the limit, idle ones are closed, or new ones are closed once accepted.
    pub connections: usize,
    /// Concurrent connections from one address; 0: no limit.
    pub address_connections: usize,
    /// Concurrent calls of all connections; more are refused.
    pub calls: usize,
    /// Concurrent calls of unknown callers.
    pub unknown_calls: usize,
    /// Concurrent health checks.
    pub health_calls: usize,
    pub watches: usize,
    /// Concurrent calls of a connection; more wait in the client.
    pub streams: u32,
    /// Size of a call's headers as HTTP/2 counts it: name, value and 32 bytes for each.
    pub header_bytes: usize,
    /// Status that refuses larger headers.
    pub headers_too_large: Status,
    /// Bytes of messages and replies of all calls. Beyond it, large calls are refused.
    pub budget_bytes: usize,
    /// Bytes of messages and replies of a connection's calls.
    pub connection_bytes: usize,
    /// Unanswered steps of a connection at which reading it pauses.
    pub connection_steps: usize,
    /// Time that a reply may wait until its client has room. Its stream is not read meanwhile.
    pub unread: Duration,
    /// Bytes of fast-path messages waiting for Python at which reading of streams pauses.
    pub queued_bytes: usize,
    /// Longest pause within a message.
    pub receive: Duration,
    /// Minimum rate of a message after that time.
    pub receive_bytes_per_s: usize,
    /// Status that refuses calls for lack of room.
    pub overloaded: Status,
    /// Unanswered fast-path frames of a stream at which reading it pauses.
    pub frames: usize,
    /// Interval of pings to a silent client.
    pub keepalive: Duration,
    /// Time limit of the answer to a ping.
    pub keepalive_timeout: Duration,
    /// Approximate time for which a connection accepts calls.
    pub age: Option<Duration>,
    /// Time to finish them afterwards.
    pub age_grace: Duration,
    /// Time limit of the HTTP/2 handshake.
    pub handshake: Duration,
}

impl Limits {
    /// Returns the size limit of messages to a method.
    pub fn message_bytes_of(&self, method: Method) -> usize {
        if method.is_open {
            self.message_bytes.min(self.open_message_bytes)
        } else {
            self.message_bytes
        }
    }

    /// Read limits by name, times in seconds. Err: the name of a missing one.
    pub fn read(
        numbers: &HashMap<String, f64>,
        overloaded: Status,
        headers_too_large: Status,
    ) -> Result<Self, String> {
        let number = |name: &str| numbers.get(name).copied().ok_or_else(|| name.to_owned());
        let whole = |name: &str| number(name).map(|value| value as usize);
        let time = |name: &str| number(name).map(Duration::from_secs_f64);
        Ok(Limits {
            message_bytes: whole("message_bytes")?,
            open_message_bytes: whole("open_message_bytes")?,
            connections: whole("connections")?,
            address_connections: whole("address_connections")?,
            calls: whole("calls")?,
            unknown_calls: whole("unknown_calls")?,
            health_calls: whole("health_calls")?,
            watches: whole("watches")?,
            receive: time("receive_s")?,
            receive_bytes_per_s: whole("receive_bytes_per_s")?.max(1),
            streams: whole("streams")? as u32,
            header_bytes: whole("header_bytes")?,
            headers_too_large,
            budget_bytes: whole("budget_bytes")?,
            connection_bytes: whole("connection_bytes")?,
            connection_steps: whole("connection_steps")?,
            unread: time("unread_s")?,
            queued_bytes: whole("queued_bytes")?,
            overloaded,
            frames: whole("frames")?,
            keepalive: time("keepalive_s")?,
            keepalive_timeout: time("keepalive_timeout_s")?,
            handshake: time("handshake_s")?,
            age: Some(time("age_s")?).filter(|age| !age.is_zero()),
            age_grace: time("age_grace_s")?,
        })
    }

    #[cfg(test)]
    pub fn for_test() -> Self {
        let names = [
            ("message_bytes", 1 << 20),
            ("open_message_bytes", 1 << 12),
            ("connections", 10),
            ("address_connections", 0),
            ("calls", 10),
            ("unknown_calls", 10),
            ("health_calls", 10),
            ("watches", 10),
            ("receive_s", 1),
            ("receive_bytes_per_s", 1024),
            ("streams", 10),
            ("header_bytes", 1 << 14),
            ("budget_bytes", 16 << 20),
            ("connection_bytes", 1 << 20),
            ("connection_steps", 100),
            ("unread_s", 1),
            ("queued_bytes", 1 << 20),
            ("frames", 10),
            ("keepalive_s", 1),
            ("keepalive_timeout_s", 1),
            ("handshake_s", 1),
            ("age_s", 0),
            ("age_grace_s", 0),
        ];
        let numbers = names.map(|(name, value)| (name.to_owned(), f64::from(value))).into();
        Limits::read(&numbers, Status::new(8, "overloaded"), Status::new(8, "headers"))
            .unwrap_or_else(|missing| unreachable!("{missing}"))
    }
}
