//! Commands from Python to the front's thread.

use crate::calls::answers::HttpAnswer;
use crate::messages::grpc::{self, Status};
use crate::steps::call::Call;
use crate::steps::columns::Batch;
use crate::steps::reply::{deliver, Answer, StepReplies};
use crate::triton::reply::InferReplies;
use bytes::Bytes;
use std::sync::Arc;

/// A command from Python.
pub enum Command {
    Deliver(Arc<Batch>, Answer),
    Finish(Arc<Call>, Bytes),
    Write(Arc<Call>, Bytes, Option<u64>),
    End(Arc<Call>, Status),
    Admit(Arc<Call>),
    Respond(Arc<Call>, Box<HttpAnswer>),
    Send(Arc<Call>, Bytes),
    Read(Arc<Call>, usize),
}

/// Run in the thread that drives the sockets.
pub fn carry_out(command: Command) {
    match command {
        Command::Deliver(batch, answer) => match &batch.signature.model {
            None => deliver(&StepReplies, &batch, &answer),
            Some((model, _)) => deliver(&InferReplies { model }, &batch, &answer),
        },
        Command::Finish(call, message) => call.finish(grpc::framed(&message)),
        Command::Write(call, message, number) => call.write(&message, number),
        Command::End(call, status) => call.end(status),
        Command::Admit(call) => call.admit(),
        Command::Respond(call, answer) => call.respond(answer.head, answer.body, answer.has_more),
        Command::Send(call, part) => call.reply(part, None, None),
        Command::Read(call, count) => call.read(count),
    }
}
