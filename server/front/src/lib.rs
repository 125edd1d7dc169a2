//! The native front: gRPC over HTTP/2 on a thread of its own, which never takes Python's lock for the wire's work.
//!
//! What comes is put into columns if it is a plain step (`steps::plain`, `triton::request`), and else handed on with its
//! bytes. An eventfd wakes Python's event loop, which takes what has come, in its order, and answers a batch in one call
//! (`steps::reply`, `triton::reply`). No rule and no message text of the server is in here: those are Python's.
//!
//! Threads: `Front`'s methods are for one thread, that of the event loop. The wire has a thread (`wire`, `calls`), which
//! at times leaves its work to the event loop (`python::driver`); the two share the `Queue` of arrivals and each `Call`,
//! both behind short locks that are never held while something waits.
//!
//! The folders stand below in their order: each uses those above it, and none below.

#![deny(unsafe_code)]
#![cfg_attr(not(feature = "python"), allow(dead_code))] // what only Python calls

mod clock;
mod method;
mod wakeup;

/// gRPC's and protobuf's messages as bytes.
mod messages {
    pub mod grpc;
    pub mod inflate;
    pub mod protobuf;
    pub mod shape;
}

/// What peers and callers may make the server hold and do.
mod limits {
    pub mod bounds;
    pub mod callers;
    pub mod load;
    pub mod peer;
    pub mod places;
    pub mod refusals;
    pub mod settings;
    pub mod tenancy;
    pub mod turn;
}

/// Steps: from their messages into columns, and the answers to columns into messages.
mod steps {
    pub mod call;
    pub mod columns;
    pub mod ids;
    pub mod ordered;
    pub mod plain;
    pub mod reply;
}

/// The same for Triton's requests.
mod triton {
    pub mod reply;
    pub mod request;
}

/// Calls on the wire, from their headers to their end, and the queue to Python.
mod calls {
    mod answering;
    mod begin;
    pub mod queue;
    pub mod serve;
    pub mod service;
}

/// Connections.
mod wire {
    mod doors;
    mod lifetime;
    pub mod server;
    pub mod tls;
}

/// What Python sees of the front, and what it asks of the wire.
mod python {
    mod commands;
    mod driver;
    #[cfg(feature = "python")]
    mod front;
    #[cfg(feature = "python")]
    mod known;
    #[cfg(feature = "python")]
    mod lists;
}
