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

/// Sessions of one batch, and of what Python takes at a time: about a pass, so that passes run in between.
pub const MAX_IN_BATCH: usize = 1024;
/// Sessions of a step that shares no batch with other connections' steps: these would wait for it.
pub const LARGE: usize = 64;
/// Calls that have begun since Python looked last.
const MAX_CALLS: usize = 10_000;
/// Batches of different signatures that are filled at the same time.
const MAX_OPEN: usize = 16;

/// What steps must have in common to stand in the same columns.
#[derive(Debug, PartialEq, Eq)]
pub struct Signature {
    /// Name and version of the model as Triton's requests say them; None: these are steps of Stepwell's own protocol.
    pub model: Option<(String, String)>,
    pub select: u8,
    pub output_names: Vec<String>,
    pub has_expected: bool,
    pub has_request_ids: bool,
    pub says_sizes: bool,
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
            says_sizes: step.says_sizes,
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
            && self.says_sizes == step.says_sizes
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
    /// Who asks for it; None: anybody.
    pub whose: Option<Arc<Known>>,
    /// Tells it from the stream's others; None: the call is unary.
    pub frame_id: Option<u64>,
    /// None: it is of Stepwell's own protocol.
    pub request: Option<Request>,
    /// Its first session in the columns.
    pub first: u32,
    pub count: u32,
    /// When it came, seconds on the monotonic clock.
    pub arrived: f64,
    /// Sessions without an answer on its way.
    pub left: AtomicU32,
    /// Sessions that Python has not answered.
    pub unanswered: AtomicU32,
    /// One number may stand for all sessions in its answer.
    pub is_short: bool,
    /// Bytes of the message.
    pub held: usize,
}

impl Entry {
    /// All of its sessions have their answers.
    pub fn is_answered(&self) -> bool {
        self.left.load(Ordering::Relaxed) == 0
    }
}

/// Steps that nobody will answer any more: the server ends, or they were dropped with their call.
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
    /// Of each session, on the monotonic clock.
    pub deadlines: Vec<f64>,
    /// Of each tensor of the signature.
    pub data: Vec<Vec<u8>>,
    pub entries: Vec<Entry>,
    /// The number of the connection that all of it has come over; None: of several.
    connection: Option<u64>,
    /// One of its steps is `LARGE`.
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

    /// A step of so many sessions that has come over a connection may stand here.
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
            whose: step.whose.clone(),
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

    /// The ids, in their order.
    pub fn session_ids(&self) -> impl Iterator<Item = &str> {
        self.ids.iter()
    }
}

/// What Python is to know of.
#[derive(Debug)]
pub enum Arrival {
    /// Steps that need nothing but columns.
    Batch(Box<Batch>),
    /// A call has begun; with its request if it does not stream.
    Call(Arc<Call>, Option<Bytes>),
    /// A unary call has begun: is its caller known, and may it? Its message is not taken in before that is answered.
    Judge(Arc<Call>),
    /// A message of a stream, and the number of its reply where those leave in the order of the messages.
    Message(Arc<Call>, Bytes, Option<u64>),
    /// A message was too large: so many bytes.
    TooLarge(Arc<Call>, usize),
    /// A message breaks a rule of its shape: the only one of a call, which begins with it, or one of a stream.
    Breach(Arc<Call>, Breach),
    /// A frame has the id of another that is not answered.
    Duplicate(Arc<Call>, u64),
    /// The client has sent its last message.
    HalfClosed(Arc<Call>),
    /// Replies of a stream are on their way: so many bytes.
    Written(Arc<Call>, usize),
    /// Nobody waits for the call any more.
    Ended(Arc<Call>),
    /// The log shall say that connections are refused.
    Refused(Refusal),
}

/// What has come since Python looked last.
#[derive(Debug, Default)]
pub struct Arrivals {
    all: VecDeque<Arrival>,
    /// Batches that may still be filled, with the hashes of their sessions' ids if there are several.
    open: Vec<(usize, HashSet<u64>)>,
    hasher: RandomState,
    /// Calls among them.
    calls: usize,
}

impl Arrivals {
    /// So many calls have begun that Python does not know of that more of them are refused.
    pub fn has_many_calls(&self) -> bool {
        self.calls >= MAX_CALLS
    }

    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// The first of what has come, up to so many steps, as `GENERAL` counts them; and the bytes of fast-path messages.
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

    /// Add what is no fast-path step. What comes later stays behind it.
    pub fn push(&mut self, arrival: Arrival) {
        self.open.clear();
        self.calls += usize::from(matches!(arrival, Arrival::Call(..)));
        self.all.push_back(arrival);
    }

    /// Add a fast-path step to the batch of its signature, unless it would overtake an earlier one of its sessions there.
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

    /// The place in `open` of the batch that a step goes to.
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
            // from now on it matters who is in which
            let (index, hashes) = &mut self.open[0];
            if let Arrival::Batch(batch) = &self.all[*index] {
                hashes.extend(batch.session_ids().map(|id| self.hasher.hash_one(id)));
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
            // of either protocol: they may name the same session
            model: (select % 2 == 1).then_some(("m", "")),
            ..Step::default()
        };
        arrivals.push_step(Arc::new(Call::for_test()), None, &step, f64::INFINITY, 0);
    }

    /// Sessions and numbers in the order in which Python will see them.
    fn order(arrivals: &mut Arrivals) -> Vec<(String, u64)> {
        let mut found = Vec::new();
        for arrival in arrivals.take(usize::MAX).0 {
            if let Arrival::Batch(batch) = arrival {
                let numbers =
                    batch.data[0].chunks_exact(8).map(|bytes| u64::from_le_bytes(bytes.try_into().unwrap()));
                found.extend(batch.session_ids().map(str::to_owned).zip(numbers));
            }
        }
        found
    }

    #[test]
    fn steps_that_are_alike_share_a_batch() {
        let mut arrivals = Arrivals::default();
        for number in 0..10 {
            push(&mut arrivals, &format!("s{number}"), (number % 2 * 4) as u8, number);
        }
        assert_eq!(arrivals.take(usize::MAX).0.len(), 2);
    }

    #[test]
    fn a_large_step_shares_no_batch_with_other_connections_and_nothing_overtakes() {
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
        push(2, LARGE - 1, 1); // small ones share
        push(3, 0, LARGE);
        push(3, 0, LARGE); // as do all of one connection
        push(3, 0, 1); // would overtake in the first one
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
    fn tenants_share_a_batch_and_no_names() {
        let mut arrivals = Arrivals::default();
        let mut push = |tenant: &str, id: &str, select: u8| {
            let whose = Known::new(format!("{tenant}\u{1f}"), tenant.to_owned(), true, None, f64::INFINITY);
            let step = Step {
                session_ids: vec![id],
                tensors: vec![Tensor { name: "", dtype: 9, shape: vec![1], data: &[0] }],
                sizes: vec![1],
                select,
                whose: Some(whose),
                ..Step::default()
            };
            arrivals.push_step(Arc::new(Call::for_test()), None, &step, f64::INFINITY, 0);
        };
        push("a", "s", 0);
        push("a", "s", 2);
        push("b", "s", 0); // overtakes nothing of its own
        push("a", "s", 0);
        let found: Vec<(Vec<String>, Vec<String>)> =
            std::iter::from_fn(|| match arrivals.take(1).0.pop()? {
                Arrival::Batch(batch) => Some((
                    batch.session_ids().map(str::to_owned).collect(),
                    batch
                        .entries
                        .iter()
                        .map(|entry| entry.whose.as_ref().unwrap().identity.clone())
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
    fn nothing_is_added_before_an_event() {
        let mut arrivals = Arrivals::default();
        push(&mut arrivals, "a", 0, 1);
        arrivals.push(Arrival::HalfClosed(Arc::new(Call::for_test())));
        push(&mut arrivals, "a", 0, 2);
        assert_eq!(arrivals.take(usize::MAX).0.len(), 3);
    }

    #[test]
    fn what_is_taken_at_a_time_is_about_a_pass() {
        let mut arrivals = Arrivals::default();
        for number in 0..3 * MAX_IN_BATCH as u64 {
            push(&mut arrivals, &format!("s{number}"), 0, number);
        }
        let (taken, bytes) = arrivals.take(MAX_IN_BATCH);
        assert_eq!((taken.len(), bytes), (1, 0));
        push(&mut arrivals, "s0", 0, 9);
        assert_eq!(arrivals.take(usize::MAX).0.len(), 3, "what comes now is behind what waits");
        assert!(arrivals.is_empty());
        for _ in 0..MAX_IN_BATCH {
            arrivals.push(Arrival::Call(Arc::new(Call::for_test()), None));
        }
        assert_eq!(arrivals.take(MAX_IN_BATCH).0.len(), MAX_IN_BATCH / GENERAL);
    }

    proptest! {
        #[test]
        fn a_session_keeps_its_order(steps in prop::collection::vec((0u8..5, 0u8..8), 0..200)) {
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
