//! The native front: gRPC over HTTP/2 on a thread of its own, which never takes Python's lock for the wire's work.
//!
//! What comes is put into columns (`columns`) if it is a plain step (`plain`, `triton`), and else handed on with its bytes. An
//! eventfd wakes Python's event loop, which takes what has come, in its order, and answers a batch in one call
//! (`reply`, `triton_reply`). No rule and no message text of the server is in here: those are Python's.
//!
//! Threads: `Front`'s methods are for one thread, that of the event loop. The wire has a thread (`server`, `serve`),
//! which at times leaves its work to the event loop (`driver`); the two share `Shared` and each `Call`, both behind
//! short locks that are never held while something waits.

#![deny(unsafe_code)]
#![cfg_attr(not(feature = "python"), allow(dead_code))] // what only Python calls

mod answering;
mod begin;
mod bounds;
mod call;
mod callers;
mod clock;
mod columns;
mod commands;
mod doors;
mod driver;
mod grpc;
mod inflate;
#[cfg(feature = "python")]
mod known;
mod lifetime;
mod limits;
#[cfg(feature = "python")]
mod lists;
mod ordered;
mod places;
mod plain;
mod protobuf;
#[cfg(feature = "python")]
mod python;
mod reply;
mod serve;
mod server;
mod sets;
mod shape;
mod tenancy;
mod tls;
mod triton;
mod triton_reply;
mod turn;
mod wakeup;
