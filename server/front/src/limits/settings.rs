//! Limits of clients, which Python sets.

use crate::messages::grpc::Status;
use crate::method::Method;
use std::collections::HashMap;
use std::time::Duration;

/// How the wire behaves.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Of a message, inflated or not.
    pub message_bytes: usize,
    /// The same, of a method that everybody may call.
    pub open_message_bytes: usize,
    /// At the same time: for more of them, others leave that do nothing, or they are closed as soon as they are accepted.
    pub connections: usize,
    /// The same, from one address; 0: no limit.
    pub address_connections: usize,
    /// Calls of all connections at the same time; more are refused.
    pub calls: usize,
    /// The same, of callers that are not known.
    pub unknown_calls: usize,
    /// The same, for health checks.
    pub health_calls: usize,
    pub watches: usize,
    /// Calls of one connection at the same time; more of them wait at the client.
    pub streams: u32,
    /// Of the headers of a call, as HTTP/2 counts them: 32 bytes for each beside name and value.
    pub header_bytes: usize,
    /// How they are refused that are larger.
    pub headers_too_large: Status,
    /// Bytes of messages and replies of all calls together; then those that hold much are refused.
    pub budget_bytes: usize,
    /// The same, of the calls of one connection.
    pub connection_bytes: usize,
    /// Steps of one connection that Python was handed and has not answered, before it is read no further.
    pub connection_steps: usize,
    /// How long a reply may wait for its client to make room. Meanwhile its stream is not read.
    pub unread: Duration,
    /// Bytes of fast-path messages that may wait for Python before streams are read no further.
    pub queued_bytes: usize,
    /// A message may pause for this time while it comes.
    pub receive: Duration,
    /// And must come at this rate, or faster, after this time.
    pub receive_bytes_per_s: usize,
    /// How calls are refused for which there is no room.
    pub overloaded: Status,
    /// Fast-path frames of one stream that are not answered, before reading stops.
    pub frames: usize,
    /// The server asks so often whether a silent client is there.
    pub keepalive: Duration,
    /// And gives up after this.
    pub keepalive_timeout: Duration,
    /// A connection takes calls for about so long.
    pub age: Option<Duration>,
    /// And then has so long to finish them.
    pub age_grace: Duration,
    /// The time that a connection has to begin to speak HTTP/2.
    pub handshake: Duration,
}

impl Limits {
    /// Of a message of this method.
    pub fn message_bytes_of(&self, method: Method) -> usize {
        if method.is_open {
            self.message_bytes.min(self.open_message_bytes)
        } else {
            self.message_bytes
        }
    }

    /// Of numbers by their names, times in seconds. Err: the name of one that is missing.
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
