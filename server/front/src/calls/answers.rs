//! Answers over HTTP: those to requests that the front refuses itself, which Python has worded, and Python's own.

use crate::method::{FastPath, Method};
use bytes::Bytes;
use http::header::CONTENT_LENGTH;
use http::{HeaderName, HeaderValue, Response, StatusCode};
use std::collections::HashMap;

/// An answer as Python gives it: status, headers, body.
pub type Given = (u16, Vec<(String, String)>, Bytes);

/// An answer, or its beginning.
#[derive(Clone, Debug)]
pub struct HttpAnswer {
    pub head: Response<()>,
    pub body: Bytes,
    /// Whether parts of the body follow.
    pub has_more: bool,
}

impl HttpAnswer {
    /// `has_more`: parts of the body follow. None: not a status and headers of HTTP.
    pub fn new((status, headers, body): Given, has_more: bool) -> Option<Self> {
        let mut head = Response::new(());
        *head.status_mut() = StatusCode::from_u16(status).ok()?;
        for (name, value) in headers {
            let name = HeaderName::try_from(name).ok()?;
            head.headers_mut().append(name, HeaderValue::try_from(value).ok()?);
        }
        // an answer to HEAD gives the length that the body would have, and a 304 may leave it out
        if !has_more && head.status() != StatusCode::NOT_MODIFIED {
            head.headers_mut().entry(CONTENT_LENGTH).or_insert(HeaderValue::from(body.len()));
        }
        Some(HttpAnswer { head, body, has_more })
    }
}

/// The settings of HTTP that is not gRPC.
#[derive(Debug)]
pub struct Door {
    /// Python's method for all requests.
    pub method: Method,
    /// Limit of a request's body.
    pub body_bytes: usize,
    pub overloaded: HttpAnswer,
    pub headers_too_large: HttpAnswer,
    pub body_too_large: HttpAnswer,
    pub malformed: HttpAnswer,
    pub two_lengths: HttpAnswer,
    pub slow: HttpAnswer,
    pub bad_timeout: HttpAnswer,
    pub late: HttpAnswer,
    pub failed: HttpAnswer,
}

impl Door {
    /// `index`: of Python's method. Err: the name of an answer that is missing or makes no sense.
    pub fn read(
        index: usize,
        body_bytes: usize,
        mut answers: HashMap<String, Given>,
    ) -> Result<Self, String> {
        let mut take = |name: &str| {
            let given = answers.remove(name);
            given.and_then(|given| HttpAnswer::new(given, false)).ok_or_else(|| name.to_owned())
        };
        Ok(Door {
            method: Method { index, streams: false, fast_path: FastPath::No, is_open: false },
            body_bytes,
            overloaded: take("overloaded")?,
            headers_too_large: take("headers_too_large")?,
            body_too_large: take("body_too_large")?,
            malformed: take("malformed")?,
            two_lengths: take("two_lengths")?,
            slow: take("slow")?,
            bad_timeout: take("bad_timeout")?,
            late: take("late")?,
            failed: take("failed")?,
        })
    }

    /// The last event of an answer that its deadline ends. Answers in parts are server-sent events.
    pub fn late_event(&self, id: u64) -> Bytes {
        let begin = format!("event: error\nid: {id}\ndata: ");
        Bytes::from([begin.as_bytes(), &self.late.body[..], b"\n\n"].concat())
    }

    #[cfg(test)]
    pub fn for_test() -> Self {
        let answers = [
            ("overloaded", 429),
            ("headers_too_large", 431),
            ("body_too_large", 413),
            ("malformed", 400),
            ("two_lengths", 400),
            ("slow", 408),
            ("bad_timeout", 400),
            ("late", 504),
            ("failed", 500),
        ];
        let given = |(name, status): (&str, u16)| {
            (name.to_owned(), (status, Vec::new(), Bytes::from(name.to_owned())))
        };
        Door::read(0, 100, answers.into_iter().map(given).collect())
            .unwrap_or_else(|missing| unreachable!("{missing}"))
    }
}
