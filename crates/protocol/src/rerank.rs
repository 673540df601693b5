//! Rerank streams: the texts of many messages gathered into one request.

use crate::Error;
use crate::tei::v1::{RerankRequest, RerankStreamRequest};

/// Gathers the messages of a `RerankStream`. Their query, options and order
/// become those of one `Rerank`.
#[derive(Debug, Default)]
pub struct RerankGathering {
    request: RerankRequest,
    bytes: usize,
}

impl RerankGathering {
    /// Counts the bytes of a message that has arrived and is not decoded yet:
    /// all messages together are at most `bytes_max`.
    pub fn reserve(&mut self, bytes: usize, bytes_max: usize) -> Result<(), Error> {
        self.bytes = self.bytes.saturating_add(bytes);
        if self.bytes > bytes_max {
            return Err(Error::too_large(self.bytes, bytes_max));
        }
        Ok(())
    }

    /// Adds the text of a message; there are at most `texts_max`.
    pub fn push(&mut self, message: RerankStreamRequest, texts_max: usize) -> Result<(), Error> {
        let gathered = &mut self.request;
        if gathered.texts.len() >= texts_max {
            let reason = format!("has over {texts_max} texts, the limit for a request");
            return Err(Error::invalid("texts", reason));
        }
        if gathered.texts.is_empty() {
            gathered.query = message.query;
            gathered.truncate = message.truncate;
            gathered.raw_scores = message.raw_scores;
            gathered.return_text = message.return_text;
            gathered.truncation_direction = message.truncation_direction;
        } else if message.query != gathered.query {
            let reason = "must be the same in every message of the stream";
            return Err(Error::invalid("query", reason));
        }
        gathered.texts.push(message.text);
        Ok(())
    }

    /// The one request.
    pub fn into_request(self) -> RerankRequest {
        self.request
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(query: &str, text: &str) -> RerankStreamRequest {
        RerankStreamRequest {
            query: query.into(),
            text: text.into(),
            truncate: true,
            ..Default::default()
        }
    }

    #[test]
    fn messages_become_one_request() {
        let mut gathering = RerankGathering::default();
        gathering.reserve(6, 8).unwrap();
        gathering.push(message("q", "a"), 2).unwrap();
        let error = gathering.push(message("other", "b"), 2).unwrap_err();
        assert_eq!(error.field().unwrap(), "query");
        gathering.push(message("q", "b"), 2).unwrap();
        let error = gathering.push(message("q", "c"), 2).unwrap_err();
        assert_eq!(error.field().unwrap(), "texts");
        assert_eq!(gathering.reserve(3, 8), Err(Error::too_large(9, 8)));
        let request = gathering.into_request();
        assert_eq!(request.texts, ["a", "b"]);
        assert!(request.truncate && request.query == "q");
    }
}
