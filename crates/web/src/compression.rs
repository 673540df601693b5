//! How bodies are compressed. Large responses are compressed on the threads for
//! work; short ones where they are sent, by tower-http.

use axum::body::Body;
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use bytes::Bytes;
use http::header::{ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_LENGTH, VARY};
use http::{HeaderMap, HeaderValue};
use http_body::Body as _;
use http_body_util::BodyExt;
use platform::deflate::gzip;
use platform::inflate::Compression;
use platform::server::AnswerFor;
use protocol::Error;
use tower_http::compression::Predicate;

use super::context::hold_until_sent;
use super::error::unsupported_encoding;
use gateway::stack::Stack;

/// Longer responses are compressed on a thread for work.
const INLINE_BYTES_MAX: u64 = 64 << 10;

/// Responses that are short enough to be compressed where they are sent.
#[derive(Debug, Clone, Copy)]
pub struct Short;

impl Predicate for Short {
    fn should_compress<B: http_body::Body>(&self, response: &http::Response<B>) -> bool {
        let length = response.body().size_hint().upper();
        length.is_some_and(|length| length <= INLINE_BYTES_MAX)
    }
}

/// Compresses a large response, if the caller takes gzip. One that cannot be
/// compressed now is sent as it is.
pub async fn compress(State(stack): State<Stack>, request: Request, next: Next) -> Response {
    let accepts = accepts_gzip(request.headers());
    let response = next.run(request).await;
    if !accepts || !is_large(&response) {
        return response;
    }
    let (mut head, mut body) = response.into_parts();
    let Ok(chunks) = chunks(&mut body).await else {
        // A whole body has no error; a part of one is not sent.
        return Response::from_parts(head, body);
    };
    let own = head.extensions.get::<AnswerFor>();
    let holder = own.map(|own| own.holder.clone()).unwrap_or_default();
    let limits = stack.limits().held_by(holder);
    let Ok((packed, held)) = gzip(chunks.clone(), &limits).await else {
        return hold_until_sent(Response::from_parts(head, whole(chunks)), body);
    };
    head.headers.remove(CONTENT_LENGTH);
    let encoding = HeaderValue::from_static("gzip");
    head.headers.insert(CONTENT_ENCODING, encoding);
    let varies = HeaderValue::from_static("accept-encoding");
    head.headers.append(VARY, varies);
    if let Some(own) = head.extensions.get_mut::<AnswerFor>() {
        own.counted = true;
    }
    // What the body held is given back when the response has been sent.
    hold_until_sent(Response::from_parts(head, packed.into()), (held, body))
}

/// Whether a body is whole, long, and not compressed yet.
fn is_large(response: &Response) -> bool {
    let length = response.body().size_hint().exact();
    !response.headers().contains_key(CONTENT_ENCODING)
        && length.is_some_and(|length| length > INLINE_BYTES_MAX)
}

async fn chunks(body: &mut Body) -> Result<Vec<Bytes>, axum::Error> {
    let mut chunks = Vec::new();
    while let Some(frame) = body.frame().await {
        if let Ok(chunk) = frame?.into_data() {
            chunks.push(chunk);
        }
    }
    Ok(chunks)
}

fn whole(chunks: Vec<Bytes>) -> Body {
    let chunks = chunks.into_iter().map(Ok::<_, std::convert::Infallible>);
    Body::from_stream(futures::stream::iter(chunks))
}

/// Whether a caller takes gzip, by RFC 9110: with a weight that is not zero.
fn accepts_gzip(headers: &HeaderMap) -> bool {
    let values = headers.get_all(ACCEPT_ENCODING).into_iter();
    let texts = values.filter_map(|value| value.to_str().ok());
    let mut any = None;
    for coding in texts.flat_map(|text| text.split(',')) {
        let mut parts = coding.split(';').map(str::trim);
        let name = parts.next().unwrap_or_default();
        let weight = parts.find_map(|part| {
            let (name, value) = part.split_once('=')?;
            let is_weight = name.trim().eq_ignore_ascii_case("q");
            is_weight.then_some(value)?.trim().parse::<f32>().ok()
        });
        let taken = weight.unwrap_or(1.0) > 0.0;
        if Compression::is_gzip(name.as_bytes()) {
            return taken;
        }
        if name == "*" {
            any = Some(taken);
        }
    }
    any.unwrap_or(false)
}

/// How a body is compressed, by codings in any case (RFC 9110, 8.4); an error for
/// a format that is not supported, and for a body that is compressed twice.
pub fn of_body(headers: &HeaderMap) -> Result<Option<Compression>, Error> {
    let values = headers.get_all(CONTENT_ENCODING).into_iter();
    let codings = values.flat_map(|value| value.as_bytes().split(|byte| *byte == b','));
    let mut found = None;
    for coding in codings.map(<[u8]>::trim_ascii) {
        if coding.is_empty() || coding.eq_ignore_ascii_case(b"identity") {
            continue;
        }
        let compression = if Compression::is_gzip(coding) {
            Compression::Gzip
        } else if coding.eq_ignore_ascii_case(b"deflate") {
            Compression::Zlib
        } else {
            return Err(unsupported_encoding());
        };
        if found.replace(compression).is_some() {
            return Err(unsupported_encoding());
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codings_are_read_in_any_case() {
        // Each value is a header field of its own.
        let read = |values: &'static str| {
            let mut headers = HeaderMap::new();
            for value in values.split('|') {
                headers.append(CONTENT_ENCODING, HeaderValue::from_static(value));
            }
            of_body(&headers)
        };
        for (values, expected) in [
            ("", None),
            ("Identity", None),
            ("identity, GZIP", Some(Compression::Gzip)),
            ("identity|gzip", Some(Compression::Gzip)),
            ("X-Gzip", Some(Compression::Gzip)),
            ("Deflate", Some(Compression::Zlib)),
        ] {
            assert_eq!(read(values), Ok(expected), "{values}");
        }
        assert_eq!(of_body(&HeaderMap::new()), Ok(None));
        for wrong in ["br", "gzip, gzip", "gzip|br", "x-deflate"] {
            let error = read(wrong).unwrap_err();
            assert_eq!(error.field().unwrap().as_str(), "content-encoding");
        }
    }

    #[test]
    fn gzip_is_taken_by_its_weight() {
        for (text, taken) in [
            ("gzip", true),
            ("br, GZIP;q=0.1", true),
            ("X-Gzip", true),
            ("x-gzip;Q=0", false),
            ("gzip;q=0, *", false),
            ("*", true),
            ("*;q=0", false),
            ("br, identity", false),
            ("", false),
        ] {
            let value = HeaderValue::from_static(text);
            let headers = HeaderMap::from_iter([(ACCEPT_ENCODING, value)]);
            assert_eq!(accepts_gzip(&headers), taken, "{text}");
        }
        assert!(!accepts_gzip(&HeaderMap::new()));
    }
}
