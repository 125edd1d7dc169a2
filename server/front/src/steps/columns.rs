//! Arrivals for Python in order: batches of fast-path steps as columns, and everything else as events.

use crate::clock;
use crate::limits::callers::Known;
use crate::limits::load::GENERAL;
use crate::limits::refusals::Refusal;
use crate::messages::shape::Breach;
use crate::steps::call::Call;
use crate::steps::ids::Ids;
use crate::steps::parse::{Request, Step};
use bytes::Bytes;
use std::collections::{HashSet, VecDeque};
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::Arc;

/// Limit of sessions in a batch, and in what Python takes at a time: about one pass, so that passes run in between.
pub const MAX_IN_BATCH: usize = 1024;
/// A step of this many sessions shares no batch with steps of other connections, which would wait for it.
pub const LARGE: usize = 64;
/// Limit of new calls that Python has not taken.
const MAX_CALLS: usize = 10_000;
/// Limit of batches with different signatures that are open for more steps.
const MAX_OPEN: usize = 16;

/// The properties that all steps of a batch share.
#[derive(Debug, PartialEq, Eq)]
pub struct Signature {
    /// Name and version of the model in Triton's requests; None: steps of Stepwell's own protocol.
    pub model: Option<(String, String)>,
    pub select: u8,
    pub output_names: Vec<String>,
    pub has_expected: bool,
    pub has_request_ids: bool,
    pub has_sizes: bool,
    pub tensors: Vec<TensorKind>,
}

#[derive(Debug, PartialEq, Eq)]
pub struct TensorKind {
    pub name: String,
    pub dtype: u8,
    /// The shape without the rows.
    pub tail: Vec<usize>,
}

impl Signature {
    fn of(step: &Step<'_>) -> Self {
        Signature {
            model: step.model.map(|(name, version)| (name.to_owned(), version.to_owned())),
            select: step.select,
            output_names: step.output_names.iter().map(|name| (*name).to_owned()).collect(),
            has_expected: !step.expected.is_empty(),
            has_request_ids: !step.request_ids.is_empty(),
            has_sizes: step.has_sizes,
            tensors: step
                .tensors
                .iter()
                .map(|tensor| TensorKind {
                    name: tensor.name.to_owned(),
                    dtype: tensor.dtype,
                    tail: tensor.shape[1..].to_vec(),
                })
                .collect(),
        }
    }

    fn fits(&self, step: &Step<'_>) -> bool {
        self.select == step.select
            && self.model.as_ref().map(|(name, version)| (name.as_str(), version.as_str())) == step.model
            && self.has_expected != step.expected.is_empty()
            && self.has_request_ids != step.request_ids.is_empty()
            && self.has_sizes == step.has_sizes
            && self.output_names.iter().map(String::as_str).eq(step.output_names.iter().copied())
            && self.tensors.len() == step.tensors.len()
            && self.tensors.iter().zip(&step.tensors).all(|(kind, tensor)| {
                kind.dtype == tensor.dtype && kind.tail == tensor.shape[1..] && kind.name == tensor.name
            })
    }
}

/// One message of a batch.
#[derive(Debug)]
pub struct Entry {
    pub call: Arc<Call>,
    /// The caller; None: no authentication.
    pub caller: Option<Arc<Known>>,
    /// Identifies the message in its stream; None: the call is unary.
    pub frame_id: Option<u64>,
    /// None: a step of Stepwell's own protocol.
    pub request: Option<Request>,
    /// Index of its first session in the columns.
    pub first: u32,
    pub count: u32,
    /// Time of arrival, in seconds on the monotonic clock.
    pub arrived: f64,
    /// Sessions without an answer.
    pub left: AtomicU32,
    /// Sessions that Python has not answered yet.
    pub unanswered: AtomicU32,
    /// Whether one number may stand for all sessions in its answer.
    pub is_short: bool,
    /// Bytes of the message.
    pub held: usize,
}

impl Entry {
    /// Whether all its sessions are answered.
    pub fn is_answered(&self) -> bool {
        self.left.load(Ordering::Relaxed) == 0
    }
}

/// Ends steps without an answer: the server is shutting down, or they were dropped with their call.
impl Drop for Entry {
    fn drop(&mut self) {
        self.call.peer.load.end(*self.left.get_mut() as usize);
    }
}

/// Fast-path steps of one signature, as columns.
#[derive(Debug)]
pub struct Batch {
    pub signature: Signature,
    ids: Ids,
    pub sizes: Vec<u32>,
    pub expected: Vec<u64>,
    pub request_ids: Vec<u64>,
    /// Deadline of each session, in seconds on the monotonic clock.
    pub deadlines: Vec<f64>,
    /// The data of each tensor in the signature.
    pub data: Vec<Vec<u8>>,
    pub entries: Vec<Entry>,
    /// Number of the connection of all entries; None: several connections.
    connection: Option<u64>,
    /// Whether one of its steps is `LARGE`.
    is_large: bool,
}

impl Batch {
    fn new(step: &Step<'_>, connection: u64) -> Self {
        Batch {
            connection: Some(connection),
            is_large: false,
            signature: Signature::of(step),
            ids: Ids::default(),
            sizes: Vec::new(),
            expected: Vec::new(),
            request_ids: Vec::new(),
            deadlines: Vec::new(),
            data: step.tensors.iter().map(|_| Vec::new()).collect(),
            entries: Vec::new(),
        }
    }

    /// Whether a step of `count` sessions from this connection fits.
    fn takes(&self, count: usize, connection: u64) -> bool {
        let alone = self.connection == Some(connection);
        self.sizes.len() + count <= MAX_IN_BATCH && (alone || !(self.is_large || count >= LARGE))
    }

    fn push(&mut self, call: Arc<Call>, frame_id: Option<u64>, step: &Step<'_>, deadline: f64, held: usize) {
        let count = step.count();
        self.is_large |= count >= LARGE;
        if self.connection != Some(call.peer.number) {
            self.connection = None;
        }
        call.peer.load.begin(count);
        step.for_each_id(|id| self.ids.push(id));
        let arrived = if frame_id.is_none() { call.started } else { clock::now() };
        self.entries.push(Entry {
            call,
            caller: step.caller.clone(),
            frame_id,
            request: step.request.clone(),
            first: self.sizes.len() as u32,
            count: count as u32,
            arrived,
            left: AtomicU32::new(count as u32),
            unanswered: AtomicU32::new(count as u32),
            is_short: step.is_short,
            held,
        });
        self.sizes.extend_from_slice(&step.sizes);
        self.expected.extend_from_slice(&step.expected);
        self.request_ids.extend_from_slice(&step.request_ids);
        self.deadlines.resize(self.sizes.len(), deadline);
        for (column, tensor) in self.data.iter_mut().zip(&step.tensors) {
            column.extend_from_slice(tensor.data);
        }
    }

    /// The session ids, in order.
    pub fn session_ids(&self) -> &Ids {
        &self.ids
    }
}

/// An arrival for Python.
#[derive(Debug)]
pub enum Arrival {
    /// Fast-path steps.
    Batch(Box<Batch>),
    /// A new call, with its request if it is unary.
    Call(Arc<Call>, Option<Bytes>),
    /// A new unary call whose caller Python must authenticate. Its message is not read before the answer.
    Judge(Arc<Call>),
    /// A message of a stream, and the number of its reply if replies leave in the order of the messages.
    Message(Arc<Call>, Bytes, Option<u64>),
    /// A message that was too large, and its size in bytes.
    TooLarge(Arc<Call>, usize),
    /// A message that breaks a rule of its shape: of a stream, or the only one of a new call.
    Breach(Arc<Call>, Breach),
    /// A frame with the id of an unanswered frame.
    Duplicate(Arc<Call>, u64),
    /// The client has sent its last message.
    HalfClosed(Arc<Call>),
    /// Bytes of a stream's replies that were written.
    Written(Arc<Call>, usize),
    /// The call has ended.
    Ended(Arc<Call>),
    /// A refusal of connections to log.
    Refused(Refusal),
}

/// The arrivals that Python has not taken.
#[derive(Debug, Default)]
pub struct Arrivals {
    all: VecDeque<Arrival>,
    /// Indexes of the open batches, with hashes of their session ids if several are open.
    open: Vec<(usize, HashSet<u64>)>,
    hasher: RandomState,
    /// Number of calls among the arrivals.
    calls: usize,
}

impl Arrivals {
    /// Whether new calls must be refused, because Python has not taken too many others.
    pub fn has_many_calls(&self) -> bool {
        self.calls >= MAX_CALLS
    }

    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// Take the first arrivals, up to `most` steps as `GENERAL` counts them. Also returns the bytes of fast-path messages.
    pub fn take(&mut self, most: usize) -> (Vec<Arrival>, usize) {
        self.open.clear();
        let (mut taken, mut steps, mut bytes) = (Vec::new(), 0, 0);
        while steps < most {
            let Some(arrival) = self.all.pop_front() else { break };
            match &arrival {
                Arrival::Batch(batch) => {
                    steps += batch.sizes.len();
                    bytes += batch.entries.iter().map(|entry| entry.held).sum::<usize>();
                }
                Arrival::Call(..) => {
                    self.calls -= 1;
                    steps += GENERAL;
                }
                Arrival::Message(..) => steps += GENERAL,
                _ => {}
            }
            taken.push(arrival);
        }
        (taken, bytes)
    }

    /// Add an arrival other than a fast-path step. Later arrivals stay behind it.
    pub fn push(&mut self, arrival: Arrival) {
        self.open.clear();
        self.calls += usize::from(matches!(arrival, Arrival::Call(..)));
        self.all.push_back(arrival);
    }

    /// Add a fast-path step to the batch of its signature, unless it would overtake an earlier step of its sessions.
    pub fn push_step(
        &mut self,
        call: Arc<Call>,
        frame_id: Option<u64>,
        step: &Step<'_>,
        deadline: f64,
        held: usize,
    ) {
        let at = self.batch_for(step, call.peer.number);
        if self.open.len() > 1 {
            let hashes = self.hashes(step);
            self.open[at].1.extend(hashes);
        }
        let index = self.open[at].0;
        if let Arrival::Batch(batch) = &mut self.all[index] {
            batch.push(call, frame_id, step, deadline, held);
        }
    }

    fn hashes(&self, step: &Step<'_>) -> Vec<u64> {
        let mut hashes = Vec::with_capacity(step.count());
        step.for_each_id(|id| hashes.push(self.hasher.hash_one(id)));
        hashes
    }

    /// Returns the index in `open` of the batch for a step.
    fn batch_for(&mut self, step: &Step<'_>, connection: u64) -> usize {
        let count = step.count();
        let found = self.open.iter().position(|(index, _)| match &self.all[*index] {
            Arrival::Batch(batch) => batch.takes(count, connection) && batch.signature.fits(step),
            _ => false,
        });
        if let Some(at) = found {
            let later = &self.open[at + 1..];
            let overtakes = !later.is_empty()
                && self.hashes(step).iter().any(|hash| later.iter().any(|(_, hashes)| hashes.contains(hash)));
            if !overtakes {
                return at;
            }
            self.open.clear();
        } else if self.open.len() == MAX_OPEN {
            self.open.clear();
        } else if self.open.len() == 1 {
            // from now on the sessions of each batch matter
            let (index, hashes) = &mut self.open[0];
            if let Arrival::Batch(batch) = &self.all[*index] {
                hashes.extend(batch.session_ids().iter().map(|id| self.hasher.hash_one(id)));
            }
        }
        self.all.push_back(Arrival::Batch(Box::new(Batch::new(step, connection))));
        self.open.push((self.all.len() - 1, HashSet::new()));
        self.open.len() - 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::steps::parse::Tensor;
    use proptest::prelude::*;

    fn push(arrivals: &mut Arrivals, id: &str, select: u8, number: u64) {
        let data = number.to_le_bytes();
        let step = Step {
            session_ids: vec![id],
            tensors: vec![Tensor { name: "", dtype: 8, shape: vec![1], data: &data }],
            sizes: vec![1],
            select: select / 2,
            // of either protocol, since both may name the same session
            model: (select % 2 == 1).then_some(("m", "")),
            ..Step::default()
        };
        arrivals.push_step(Arc::new(Call::for_test()), None, &step, f64::INFINITY, 0);
    }

    /// Sessions and numbers in the order in which Python takes them.
    fn order(arrivals: &mut Arrivals) -> Vec<(String, u64)> {
        let mut found = Vec::new();
        for arrival in arrivals.take(usize::MAX).0 {
            if let Arrival::Batch(batch) = arrival {
                let numbers =
                    batch.data[0].chunks_exact(8).map(|bytes| u64::from_le_bytes(bytes.try_into().unwrap()));
                found.extend(batch.session_ids().iter().map(str::to_owned).zip(numbers));
            }
        }
        found
    }

    #[test]
    fn steps_of_one_signature_share_a_batch() {
        let mut arrivals = Arrivals::default();
        for number in 0..10 {
            push(&mut arrivals, &format!("s{number}"), (number % 2 * 4) as u8, number);
        }
        assert_eq!(arrivals.take(usize::MAX).0.len(), 2);
    }

    #[test]
    fn a_large_step_shares_no_batch_with_other_connections_and_is_not_overtaken() {
        let mut arrivals = Arrivals::default();
        let ids: Vec<String> = (0..LARGE).map(|number| format!("s{number}")).collect();
        let mut push = |connection: u64, from: usize, count: usize| {
            let data = vec![0; 8 * count];
            let step = Step {
                session_ids: ids[from..from + count].iter().map(String::as_str).collect(),
                tensors: vec![Tensor { name: "", dtype: 8, shape: vec![count], data: &data }],
                sizes: vec![1; count],
                ..Step::default()
            };
            arrivals.push_step(Arc::new(Call::of_connection(connection)), Some(1), &step, f64::INFINITY, 0);
        };
        push(1, 0, LARGE - 1);
        push(2, LARGE - 1, 1); // small steps share a batch
        push(3, 0, LARGE);
        push(3, 0, LARGE); // so do all steps of a connection
        push(3, 0, 1); // would overtake in the first batch
        push(2, 5, 1);
        push(1, 6, 1);
        let connections: Vec<Vec<u64>> = std::iter::from_fn(|| match arrivals.take(1).0.pop()? {
            Arrival::Batch(batch) => Some(batch.entries.iter().map(|entry| entry.call.peer.number).collect()),
            _ => None,
        })
        .collect();
        assert_eq!(connections, [vec![1, 2], vec![3, 3], vec![3, 2, 1]]);
    }

    #[test]
    fn tenants_share_a_batch_but_no_session_ids() {
        let mut arrivals = Arrivals::default();
        let mut push = |tenant: &str, id: &str, select: u8| {
            let caller = Known::new(format!("{tenant}\u{1f}"), tenant.to_owned(), true, None, f64::INFINITY);
            let step = Step {
                session_ids: vec![id],
                tensors: vec![Tensor { name: "", dtype: 9, shape: vec![1], data: &[0] }],
                sizes: vec![1],
                select,
                caller: Some(caller),
                ..Step::default()
            };
            arrivals.push_step(Arc::new(Call::for_test()), None, &step, f64::INFINITY, 0);
        };
        push("a", "s", 0);
        push("a", "s", 2);
        push("b", "s", 0); // overtakes no step of its tenant
        push("a", "s", 0);
        let found: Vec<(Vec<String>, Vec<String>)> =
            std::iter::from_fn(|| match arrivals.take(1).0.pop()? {
                Arrival::Batch(batch) => Some((
                    batch.session_ids().iter().map(str::to_owned).collect(),
                    batch
                        .entries
                        .iter()
                        .map(|entry| entry.caller.as_ref().unwrap().identity.clone())
                        .collect(),
                )),
                _ => None,
            })
            .collect();
        let both = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        assert_eq!(
            found,
            [
                (both(&["a\u{1f}s", "b\u{1f}s"]), both(&["a", "b"])),
                (both(&["a\u{1f}s"]), both(&["a"])),
                (both(&["a\u{1f}s"]), both(&["a"])),
            ]
        );
    }

    #[test]
    fn no_step_overtakes_an_event() {
        let mut arrivals = Arrivals::default();
        push(&mut arrivals, "a", 0, 1);
        arrivals.push(Arrival::HalfClosed(Arc::new(Call::for_test())));
        push(&mut arrivals, "a", 0, 2);
        assert_eq!(arrivals.take(usize::MAX).0.len(), 3);
    }

    #[test]
    fn python_takes_about_one_pass_at_a_time() {
        let mut arrivals = Arrivals::default();
        for number in 0..3 * MAX_IN_BATCH as u64 {
            push(&mut arrivals, &format!("s{number}"), 0, number);
        }
        let (taken, bytes) = arrivals.take(MAX_IN_BATCH);
        assert_eq!((taken.len(), bytes), (1, 0));
        push(&mut arrivals, "s0", 0, 9);
        assert_eq!(arrivals.take(usize::MAX).0.len(), 3, "new steps are behind waiting ones");
        assert!(arrivals.is_empty());
        for _ in 0..MAX_IN_BATCH {
            arrivals.push(Arrival::Call(Arc::new(Call::for_test()), None));
        }
        assert_eq!(arrivals.take(MAX_IN_BATCH).0.len(), MAX_IN_BATCH / GENERAL);
    }

    proptest! {
        #[test]
        fn steps_of_a_session_keep_their_order(steps in prop::collection::vec((0u8..5, 0u8..8), 0..200)) {
            let mut arrivals = Arrivals::default();
            for (number, (session, select)) in steps.iter().enumerate() {
                push(&mut arrivals, &format!("s{session}"), *select, number as u64);
            }
            let found = order(&mut arrivals);
            prop_assert_eq!(found.len(), steps.len());
            for session in 0..5 {
                let name = format!("s{session}");
                let own: Vec<u64> = found.iter().filter(|(id, _)| *id == name).map(|(_, number)| *number).collect();
                let mut sorted = own.clone();
                sorted.sort_unstable();
                prop_assert_eq!(own, sorted);
            }
        }
    }
}
