//! The known callers: credentials that Python has authenticated, so that it need not be asked for each call.
//!
//! Only digests of tokens are kept. Calls with unknown credentials go to Python as bytes, which authenticates
//! their callers.

use crate::clock;
use crate::limits::places::Share;
use crate::messages::protobuf::SlowPath;
use http::header::AUTHORIZATION;
use http::{HeaderMap, HeaderName};
use ring::digest::{digest, Context, SHA256, SHA256_OUTPUT_LEN};
use std::any::Any;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

/// Separates tenant and session id: see namespaces.py. Python refuses ids of clients that contain it.
pub const SEPARATOR: char = '\u{1f}';
/// Header with the tenant that an admin acts for, which Python must allow.
static TENANT: HeaderName = HeaderName::from_static("stepwell-tenant");
/// Limit of known credentials; Python handles further ones. Issuers of signed tokens can make any number.
const MAX_KNOWN: usize = 65_536;

/// A caller's credential. A token may have any bytes, so its digest never stands for a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Credential {
    /// SHA-256 of a bearer token.
    Token([u8; SHA256_OUTPUT_LEN]),
    /// SHA-256 of the names in a client certificate, each behind its length.
    Certificate([u8; SHA256_OUTPUT_LEN]),
}

impl Credential {
    /// None: not the length of a SHA-256 digest.
    pub fn of_digest(token: &[u8]) -> Option<Self> {
        token.try_into().ok().map(Credential::Token)
    }

    pub fn of_certificate(names: &[String]) -> Option<Self> {
        let mut context = Context::new(&SHA256);
        for name in names {
            context.update(&(name.len() as u64).to_be_bytes());
            context.update(name.as_bytes());
        }
        let found = context.finish().as_ref().try_into().ok()?;
        (!names.is_empty()).then_some(Credential::Certificate(found))
    }

    /// The credential of a call. `certificate`: that of its connection.
    fn of_call(headers: &HeaderMap, certificate: Option<Credential>) -> Option<Self> {
        if headers.contains_key(&TENANT) {
            return None;
        }
        let Some(value) = headers.get(AUTHORIZATION) else { return certificate };
        let token = bearer_token(value.as_bytes())?;
        Credential::of_digest(digest(&SHA256, token).as_ref())
    }
}

fn is_repeated(headers: &HeaderMap, name: &HeaderName) -> bool {
    headers.get_all(name).iter().nth(1).is_some()
}

/// The token in `Bearer TOKEN`; the scheme in any case.
fn bearer_token(value: &[u8]) -> Option<&[u8]> {
    const SCHEME: &[u8] = b"bearer ";
    let (scheme, token) = value.split_at_checked(SCHEME.len())?;
    let is_token = !token.is_empty() && token.iter().all(u8::is_ascii_graphic);
    (scheme.eq_ignore_ascii_case(SCHEME) && is_token).then_some(token)
}

/// A caller that Python has authenticated.
#[derive(Debug)]
pub struct Known {
    /// Prefix of the ids of its sessions.
    pub prefix: String,
    /// Identifies the caller.
    pub identity: String,
    /// Whether its role may step. Otherwise Python gets all of its messages.
    pub may_step: bool,
    /// Its places and bytes, over all of its credentials.
    share: OnceLock<Arc<Share>>,
    /// Python's object of the caller.
    pub who: Option<Box<dyn Any + Send + Sync>>,
    /// Expiry in seconds on the monotonic clock, as bits, because other threads read it while it changes.
    until: AtomicU64,
}

impl Known {
    pub fn new(
        prefix: String,
        identity: String,
        may_step: bool,
        who: Option<Box<dyn Any + Send + Sync>>,
        until: f64,
    ) -> Arc<Self> {
        let (share, until) = (OnceLock::new(), AtomicU64::new(until.to_bits()));
        Arc::new(Known { prefix, identity, may_step, share, who, until })
    }

    fn share(&self) -> &Arc<Share> {
        self.share.get_or_init(Arc::default)
    }

    fn is_same(&self, other: &Known) -> bool {
        self.prefix == other.prefix && self.identity == other.identity
    }

    fn until(&self) -> f64 {
        f64::from_bits(self.until.load(Ordering::Relaxed))
    }

    fn set_until(&self, until: f64) {
        self.until.store(until.to_bits(), Ordering::Relaxed);
    }

    fn forget(&self) {
        self.set_until(f64::NEG_INFINITY);
    }

    fn is_valid(&self) -> bool {
        let until = self.until();
        until == f64::INFINITY || clock::now() < until
    }
}

/// All known callers.
#[derive(Debug, Default)]
pub struct Callers(Mutex<Table>);

#[derive(Debug, Default)]
struct Table {
    known: HashMap<Credential, Arc<Known>>,
    /// Share of each caller by identity, while it has calls or a known credential.
    shares: HashMap<String, Weak<Share>>,
    /// Earliest expiry of a credential when the table was last full.
    full_until: f64,
}

impl Callers {
    /// Add a caller's credential. If it belonged to another caller, that caller's entry is forgotten.
    pub fn know(&self, credential: Credential, caller: Arc<Known>) {
        let mut table = self.table();
        if let Some(known) = table.known.get(&credential) {
            if known.is_same(&caller) {
                return known.set_until(caller.until());
            }
            known.forget();
        } else if !table.has_room() {
            return;
        }
        table.give_share(&caller);
        table.known.insert(credential, caller);
    }

    /// Forget a credential, also on open streams.
    pub fn forget(&self, credential: Credential) {
        if let Some(known) = self.table().known.remove(&credential) {
            known.forget();
        }
    }

    fn find(&self, credential: Credential) -> Option<Arc<Known>> {
        self.table().known.get(&credential).cloned()
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    /// Give a caller its share, which is the same for all of its credentials.
    fn give_share(&mut self, caller: &Known) {
        if self.shares.len() > 2 * self.known.len() + 16 {
            self.shares.retain(|_, share| share.strong_count() > 0);
        }
        let share = self.shares.get(&caller.identity).and_then(Weak::upgrade).unwrap_or_default();
        self.shares.insert(caller.identity.clone(), Arc::downgrade(&share));
        let _ = caller.share.set(share);
    }

    /// Whether there is room for one more, after removing expired credentials.
    fn has_room(&mut self) -> bool {
        if self.known.len() < MAX_KNOWN {
            return true;
        }
        if clock::now() < self.full_until {
            return false;
        }
        self.known.retain(|_, known| known.is_valid());
        self.full_until = self.known.values().map(|known| known.until()).fold(f64::INFINITY, f64::min);
        self.known.len() < MAX_KNOWN
    }
}

/// The caller of a call, as known to the front.
#[derive(Debug)]
pub enum Caller {
    /// No authentication.
    Anybody,
    /// Python authenticates every message.
    Unclear,
    /// The caller with this credential. Once known, the caller of a call stays the same.
    Of(Credential, Mutex<Option<Arc<Known>>>),
}

impl Caller {
    /// Read the caller from the headers. `certificate`: that of the connection; `callers` None: no authentication.
    pub fn of_call(
        headers: &HeaderMap,
        certificate: Option<Credential>,
        callers: Option<&Arc<Callers>>,
    ) -> Self {
        // each may occur once, since another reader may use another occurrence; without authentication there are no tenants
        let is_unclear = match callers {
            Some(_) => is_repeated(headers, &TENANT),
            None => headers.contains_key(&TENANT),
        };
        if is_unclear || is_repeated(headers, &AUTHORIZATION) {
            return Caller::Unclear; // for Python to refuse
        }
        let Some(callers) = callers else { return Caller::Anybody };
        match Credential::of_call(headers, certificate) {
            Some(credential) => Caller::Of(credential, Mutex::new(callers.find(credential))),
            None => Caller::Unclear,
        }
    }

    /// Whether the caller is known or needs no authentication. Otherwise Python decides whether to serve the call.
    pub fn is_known(&self, callers: Option<&Arc<Callers>>) -> bool {
        matches!(self, Caller::Anybody) || self.caller(callers).is_ok()
    }

    /// Returns the share of the caller; None: not known.
    pub fn share(&self) -> Option<Arc<Share>> {
        let Caller::Of(_, own) = self else { return None };
        let own = own.lock().unwrap_or_else(PoisonError::into_inner);
        own.as_ref().map(|known| known.share().clone())
    }

    /// Returns the caller of fast-path messages; None: no authentication. Err: Python must serve the messages.
    pub fn taken(&self, callers: Option<&Arc<Callers>>) -> Result<Option<Arc<Known>>, SlowPath> {
        if matches!(self, Caller::Anybody) {
            return Ok(None);
        }
        self.caller(callers).and_then(|known| if known.may_step { Ok(Some(known)) } else { Err(SlowPath) })
    }

    /// Returns the caller, while its credential is valid.
    fn caller(&self, callers: Option<&Arc<Callers>>) -> Result<Arc<Known>, SlowPath> {
        let Caller::Of(credential, own) = self else { return Err(SlowPath) };
        let mut own = own.lock().unwrap_or_else(PoisonError::into_inner);
        let known = own.as_ref().ok_or(SlowPath)?;
        if known.is_valid() {
            return Ok(known.clone());
        }
        // the credential may have been renewed
        let again = callers.and_then(|callers| callers.find(*credential));
        let again = again.filter(|again| again.is_same(known) && again.is_valid()).ok_or(SlowPath)?;
        *own = Some(again.clone());
        Ok(again)
    }

    /// Python has authenticated the caller. Further messages may take the fast path, if the front knows that caller.
    pub fn identified(&self, identity: &str, callers: Option<&Arc<Callers>>) {
        let (Caller::Of(credential, own), Some(callers)) = (self, callers) else { return };
        let mut own = own.lock().unwrap_or_else(PoisonError::into_inner);
        if own.is_none() {
            *own = callers.find(*credential).filter(|known| known.identity == identity);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;
    use proptest::prelude::*;

    fn headers(lines: &[(&'static str, &[u8])]) -> HeaderMap {
        let mut found = HeaderMap::new();
        for (name, value) in lines {
            found.append(*name, HeaderValue::from_bytes(value).unwrap());
        }
        found
    }

    fn token(text: &str) -> Credential {
        Credential::of_digest(digest(&SHA256, text.as_bytes()).as_ref()).unwrap()
    }

    /// Add a caller of a tenant, identified by the tenant alone.
    fn know(callers: &Callers, credential: Credential, tenant: &str, until: f64) {
        let prefix = format!("{tenant}{SEPARATOR}");
        callers.know(credential, Known::new(prefix, tenant.to_owned(), true, None, until));
    }

    fn caller_of(callers: &Arc<Callers>, lines: &[(&'static str, &[u8])]) -> Caller {
        Caller::of_call(&headers(lines), None, Some(callers))
    }

    /// The tenant of fast-path messages; None: they go to Python.
    fn tenant(call: &Caller, callers: &Arc<Callers>) -> Option<String> {
        call.taken(Some(callers)).ok().flatten().map(|known| known.identity.clone())
    }

    fn tenant_of(callers: &Arc<Callers>, lines: &[(&'static str, &[u8])]) -> Option<String> {
        tenant(&caller_of(callers, lines), callers)
    }

    const ANNA: &[(&str, &[u8])] = &[("authorization", b"Bearer anna")];

    #[test]
    fn callers_are_authenticated_only_if_configured() {
        assert!(Caller::of_call(&headers(ANNA), None, None).taken(None).unwrap().is_none());
        let tenant = headers(&[(TENANT.as_str(), b"x")]);
        assert!(Caller::of_call(&tenant, None, None).taken(None).is_err(), "Python refuses it");
        for twice in [[ANNA[0], ANNA[0]], [(TENANT.as_str(), b"x"), (TENANT.as_str(), b"x")]] {
            assert!(Caller::of_call(&headers(&twice), None, None).taken(None).is_err(), "Python refuses it");
        }
        let callers = Arc::default();
        assert!(caller_of(&callers, &[]).taken(Some(&callers)).is_err());
        assert!(caller_of(&callers, ANNA).taken(Some(&callers)).is_err());
    }

    #[test]
    fn a_known_token_identifies_its_caller_and_odd_headers_identify_none() {
        let callers = Arc::default();
        know(&callers, token("anna"), "acme", f64::INFINITY);
        let known = caller_of(&callers, ANNA).taken(Some(&callers)).unwrap().unwrap();
        assert_eq!(known.prefix, "acme\u{1f}");
        for value in [&b"Bearer anna"[..], b"bearer anna", b"BEARER anna"] {
            assert_eq!(tenant_of(&callers, &[("authorization", value)]), Some("acme".to_owned()));
        }
        for value in [
            &b"Bearer ann"[..],
            b"Bearer annaa",
            b"Bearer  anna",
            b"Bearer anna ",
            b"Bearer\tanna",
            b"Basic anna",
            b"Bearer ",
            b"Bearer",
            b"anna",
            b"",
            b"Bearer anna\xff",
            b"Bearer anna,Bearer anna",
        ] {
            assert_eq!(tenant_of(&callers, &[("authorization", value)]), None, "{value:?}");
        }
        assert_eq!(tenant_of(&callers, &[ANNA[0], ANNA[0]]), None);
        assert_eq!(tenant_of(&callers, &[ANNA[0], (TENANT.as_str(), b"acme")]), None);
    }

    #[test]
    fn a_certificate_counts_without_a_token_and_never_stands_for_one() {
        let callers = Arc::default();
        let names = ["anna.example".to_owned(), "spiffe://anna".to_owned()];
        let certificate = Credential::of_certificate(&names);
        know(&callers, certificate.unwrap(), "acme", f64::INFINITY);
        let tenant_of = |lines: &[(&'static str, &[u8])]| {
            tenant(&Caller::of_call(&headers(lines), certificate, Some(&callers)), &callers)
        };
        assert_eq!(tenant_of(&[]), Some("acme".to_owned()));
        assert_eq!(tenant_of(ANNA), None, "an unknown token");
        assert_eq!(Credential::of_certificate(&[]), None);
        let joined = ["anna.examplespiffe://anna".to_owned()];
        assert_ne!(Credential::of_certificate(&joined), certificate);
        let Some(Credential::Certificate(bytes)) = certificate else { unreachable!() };
        assert_ne!(Credential::of_digest(&bytes), certificate);
    }

    #[test]
    fn a_forgotten_caller_is_unknown_on_open_calls_too_until_it_is_added_again() {
        let callers = Arc::default();
        know(&callers, token("anna"), "acme", f64::INFINITY);
        let open = caller_of(&callers, ANNA);
        callers.forget(token("anna"));
        assert_eq!((tenant(&open, &callers), tenant_of(&callers, ANNA)), (None, None));
        know(&callers, token("anna"), "acme", f64::INFINITY);
        assert_eq!(tenant(&open, &callers), Some("acme".to_owned()));
    }

    #[test]
    fn an_open_call_keeps_its_caller() {
        let callers = Arc::default();
        know(&callers, token("anna"), "acme", f64::INFINITY);
        let open = caller_of(&callers, ANNA);
        know(&callers, token("anna"), "acme", f64::INFINITY);
        assert_eq!(tenant(&open, &callers), Some("acme".to_owned()), "added again");
        know(&callers, token("anna"), "other", f64::INFINITY);
        open.identified("other", Some(&callers));
        assert_eq!((tenant(&open, &callers), tenant_of(&callers, ANNA)), (None, Some("other".to_owned())));
    }

    #[test]
    fn credentials_expire_and_python_may_extend_them() {
        let callers = Arc::default();
        let now = clock::now();
        know(&callers, token("anna"), "acme", now);
        let open = caller_of(&callers, ANNA);
        assert_eq!(tenant(&open, &callers), None);
        know(&callers, token("anna"), "acme", now + 3600.0);
        assert_eq!(tenant(&open, &callers), Some("acme".to_owned()));
    }

    #[test]
    fn the_caller_of_an_open_call_may_become_known() {
        let callers = Arc::default();
        let open = caller_of(&callers, ANNA);
        know(&callers, token("anna"), "acme", f64::INFINITY);
        assert_eq!(tenant(&open, &callers), None, "Python has not identified the caller");
        open.identified("other", Some(&callers));
        assert_eq!(tenant(&open, &callers), None, "another caller");
        open.identified("acme", Some(&callers));
        assert_eq!(tenant(&open, &callers), Some("acme".to_owned()));
    }

    #[test]
    fn credentials_beyond_the_limit_are_unknown_until_others_expire() {
        let callers = Arc::default();
        let numbered =
            |number: usize| Credential::Token(std::array::from_fn(|at| (number >> (at % 8 * 8)) as u8));
        for number in 0..MAX_KNOWN {
            know(&callers, numbered(number), "acme", clock::now() + 3600.0);
        }
        know(&callers, token("anna"), "acme", f64::INFINITY);
        assert_eq!(tenant_of(&callers, ANNA), None);
        know(&callers, numbered(0), "acme", f64::NEG_INFINITY);
        callers.table().full_until = 0.0; // an hour has passed
        know(&callers, token("anna"), "acme", f64::INFINITY);
        assert_eq!(tenant_of(&callers, ANNA), Some("acme".to_owned()));
    }

    proptest! {
        #[test]
        fn no_other_header_identifies_a_known_caller(value in prop::collection::vec(0x20u8..0x7f, 0..20)) {
            let callers = Arc::default();
            know(&callers, token("anna"), "acme", f64::INFINITY);
            let is_known = tenant_of(&callers, &[("authorization", &value)]).is_some();
            prop_assert_eq!(is_known, value.to_ascii_lowercase().starts_with(b"bearer ") && &value[7..] == b"anna");
        }
    }
}
