//! The id of a request.

use http::{HeaderMap, HeaderValue};

/// The header that holds a request's id: the caller's, or one made here.
pub const REQUEST_ID: &str = "x-request-id";
/// A caller's id that is longer is replaced.
const REQUEST_ID_BYTES_MAX: usize = 128;

/// The id of a request, in its response and in the trace.
#[derive(Debug, Clone)]
pub struct RequestId(pub HeaderValue);

impl RequestId {
    /// The caller's id if it is short and printable, else a new one.
    pub fn of(headers: &HeaderMap) -> Self {
        let given = headers.get(REQUEST_ID).filter(|id| {
            let bytes = id.as_bytes();
            !bytes.is_empty()
                && bytes.len() <= REQUEST_ID_BYTES_MAX
                && bytes.iter().all(u8::is_ascii_graphic)
        });
        let made = || {
            let text = format!("{:032x}", rand::random::<u128>());
            HeaderValue::try_from(text).unwrap_or(HeaderValue::from_static("none"))
        };
        Self(given.cloned().unwrap_or_else(made))
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        self.0.to_str().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderName;

    use super::*;

    fn with(name: &'static str, value: &str) -> HeaderMap {
        HeaderMap::from_iter([(
            HeaderName::from_static(name),
            HeaderValue::from_bytes(value.as_bytes()).unwrap(),
        )])
    }

    #[test]
    fn a_callers_id_is_kept_if_it_is_short_and_printable() {
        let id = RequestId::of(&with(REQUEST_ID, "abc-1"));
        assert_eq!(id.as_str(), "abc-1");
        for wrong in ["", "a b", "ä", &"x".repeat(129)] {
            let made = RequestId::of(&with(REQUEST_ID, wrong));
            assert_eq!(made.as_str().len(), 32, "{wrong}");
        }
    }
}
