//! The native front: gRPC over HTTP/2, and JSON over HTTP, on a thread of its own, which never takes Python's lock for the wire's work.
//!
//! A step becomes columns if it is on the fast path (`steps::parse`, `triton::request`). Any other message is passed on as
//! bytes. An eventfd wakes Python's event loop, which takes the arrivals in order and answers a batch in one call
//! (`steps::reply`, `triton::reply`). Python has all rules and message texts of the server.
//!
//! Threads: `Front`'s methods are for one thread, that of the event loop. The wire has a thread (`wire`, `calls`), which
//! at times leaves its work to the event loop (`python::driver`); the two share the `Queue` of arrivals and each `Call`,
//! both behind short locks that are never held while something waits.
//!
//! The folders stand below in their order: each uses those above it, and none below.

#![deny(unsafe_code)]
#![cfg_attr(not(feature = "python"), allow(dead_code))] // called only from Python

mod clock;
mod method;
mod wakeup;

mod log_writer;

/// Wide dense layers: a delegate of LiteRT. It knows nothing of the front.
#[cfg(target_arch = "x86_64")]
mod compute {
    pub mod delegate;
    mod dense;
    mod kernel;
    mod litert;
}

/// gRPC's and protobuf's messages as bytes.
mod messages {
    pub mod grpc;
    pub mod inflate;
    pub mod protobuf;
    pub mod shape;
}

/// Bounds of the resources that peers and callers can use.
mod limits {
    pub mod bounds;
    pub mod callers;
    pub mod connections;
    pub mod lifetime;
    pub mod load;
    pub mod peer;
    pub mod places;
    pub mod read_quota;
    pub mod refusals;
    pub mod settings;
    pub mod write_through;
}

/// Steps: converts messages to columns, and the answers to messages.
mod steps {
    pub mod call;
    pub mod columns;
    pub mod durations;
    pub mod ids;
    pub mod parse;
    pub mod record;
    pub mod reply;
    pub mod reply_order;
    pub mod single;
}

/// The same for Triton's requests.
mod triton {
    pub mod reply;
    pub mod request;
}

/// Calls, from their headers to their end, and the queue to Python.
mod calls {
    mod admission;
    pub mod answers;
    pub mod queue;
    mod response;
    pub mod serve;
    pub mod service;
}

/// JSON, read and written without Python's lock. It knows nothing of the front.
mod json {
    pub mod read;
    pub mod write;
}

/// Requests of HTTP that are not gRPC, which Python answers as a whole.
mod web {
    pub mod exchange;
    pub mod http1;
    pub mod http2;
    pub mod socket;
}

/// Connections.
mod wire {
    mod acceptor;
    mod on_wake;
    pub mod server;
    pub mod tls;
}

/// The interface with Python.
mod python {
    #[cfg(feature = "python")]
    mod batch;
    mod commands;
    mod driver;
    #[cfg(feature = "python")]
    mod front;
    #[cfg(feature = "python")]
    mod json;
    #[cfg(feature = "python")]
    mod known_callers;
    #[cfg(feature = "python")]
    mod known_ids;
    #[cfg(feature = "python")]
    mod lists;
    #[cfg(feature = "python")]
    mod log_writer;
    #[cfg(feature = "python")]
    mod memory;
    #[cfg(feature = "python")]
    mod step_kernel;
}
