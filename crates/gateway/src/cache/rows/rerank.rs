//! `Rerank` of `tei.v1`: each text with the query is a row.

use bytes::Bytes;
use http::HeaderMap;
use platform::grpc::{Message, frame};
use prost::Message as _;
use protocol::tei::v1 as tei;

use super::super::key::{KeyContext, KeyWriter, RowKey};
use super::super::memory::CachedRow;
use super::{ComputedUsage, ROWS_MAX, RowRequest, SplitResponse, compute_type, text_headers};

/// A request to rerank texts by a query.
#[derive(Debug)]
pub struct RerankRows {
    request: tei::RerankRequest,
    keys: Vec<RowKey>,
}

impl RerankRows {
    /// Reads a message; None when it cannot be cached.
    pub fn read(message: Bytes, source: &KeyContext<'_>) -> Option<Box<dyn RowRequest>> {
        let bytes = message.len();
        let request = tei::RerankRequest::decode(message).ok()?;
        // A field that is unknown here may change the response.
        if request.encoded_len() != bytes {
            return None;
        }
        if request.texts.is_empty() || request.texts.len() > ROWS_MAX {
            return None;
        }
        let mut writer = KeyWriter::new("rerank", source);
        writer
            .number(request.truncate.into())
            .number(request.raw_scores.into())
            .number(u64::from(request.truncation_direction.cast_unsigned()))
            .part(request.query.as_bytes());
        let common = writer.fold();
        let keys = request.texts.iter().map(|text| {
            writer.rewind(common);
            writer.part(text.as_bytes()).key()
        });
        let keys = keys.collect();
        Some(Box::new(Self { request, keys }))
    }
}

impl RowRequest for RerankRows {
    fn keys(&self) -> &[RowKey] {
        &self.keys
    }

    fn part(&self, indices: &[usize]) -> Message {
        let texts = indices
            .iter()
            .filter_map(|&index| self.request.texts.get(index).cloned());
        Message::encode(&tei::RerankRequest {
            query: self.request.query.clone(),
            texts: texts.collect(),
            truncate: self.request.truncate,
            raw_scores: self.request.raw_scores,
            return_text: false,
            truncation_direction: self.request.truncation_direction,
        })
    }

    /// The head of a row is the kind of device, its content the score.
    fn split(&self, response: Bytes, headers: &HeaderMap, count: usize) -> Option<SplitResponse> {
        let response = tei::RerankResponse::decode(response).ok()?;
        if response.ranks.len() != count {
            return None;
        }
        let mut scores = vec![None; count];
        for rank in &response.ranks {
            let score = scores.get_mut(usize::try_from(rank.index).ok()?)?;
            if score.replace(rank.score).is_some() {
                return None;
            }
        }
        let head = Bytes::copy_from_slice(compute_type(headers));
        let rows = scores.into_iter().map(|score: Option<f32>| {
            Some(CachedRow {
                head: head.clone(),
                content: Bytes::copy_from_slice(&score?.to_le_bytes()),
            })
        });
        Some(SplitResponse {
            rows: rows.collect::<Option<_>>()?,
            timing: response.metadata.unwrap_or_default(),
        })
    }

    fn join(
        &self,
        rows: &[CachedRow],
        usage: &ComputedUsage,
        headers: &mut HeaderMap,
    ) -> Option<Bytes> {
        let texts = &self.request.texts;
        if rows.len() != texts.len() {
            return None;
        }
        let mut ranks = Vec::with_capacity(rows.len());
        for ((row, text), index) in rows.iter().zip(texts).zip(0..) {
            ranks.push(tei::Rank {
                index,
                text: self.request.return_text.then(|| text.clone()),
                score: f32::from_le_bytes(row.content.as_ref().try_into().ok()?),
            });
        }
        // As in a worker: equal scores keep the order of the request.
        ranks.sort_by(|a, b| b.score.total_cmp(&a.score));
        let kind = rows.first().map(|row| row.head.clone()).unwrap_or_default();
        text_headers(&kind, usage.timing.compute_chars, usage, headers);
        Some(frame(&tei::RerankResponse {
            ranks,
            metadata: Some(usage.timing),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SOURCE: KeyContext<'_> = KeyContext {
        scope: "team",
        model: "reranker",
        version: 1,
        digest: "abc",
    };

    fn request(texts: &[&str]) -> tei::RerankRequest {
        tei::RerankRequest {
            query: "a query".to_owned(),
            texts: texts.iter().map(ToString::to_string).collect(),
            return_text: true,
            ..Default::default()
        }
    }

    fn read(request: &tei::RerankRequest) -> Box<dyn RowRequest> {
        RerankRows::read(request.encode_to_vec().into(), &SOURCE).unwrap()
    }

    /// The response of a worker.
    fn response(request: &tei::RerankRequest, score: impl Fn(&str) -> f32) -> tei::RerankResponse {
        let mut ranks: Vec<tei::Rank> = request
            .texts
            .iter()
            .zip(0..)
            .map(|(text, index)| tei::Rank {
                index,
                text: request.return_text.then(|| text.clone()),
                score: score(text),
            })
            .collect();
        ranks.sort_by(|a, b| b.score.total_cmp(&a.score));
        tei::RerankResponse {
            ranks,
            metadata: Some(tei::Metadata::default()),
        }
    }

    #[test]
    fn the_query_and_the_parameters_change_every_key() {
        let plain = request(&["a", "b"]);
        let keys = read(&plain).keys().to_vec();
        assert_ne!(keys[0], keys[1]);
        for other in [
            tei::RerankRequest {
                query: "a quer".to_owned(),
                ..plain.clone()
            },
            tei::RerankRequest {
                truncate: true,
                ..plain.clone()
            },
            tei::RerankRequest {
                raw_scores: true,
                ..plain.clone()
            },
            tei::RerankRequest {
                truncation_direction: 1,
                ..plain.clone()
            },
        ] {
            assert!(read(&other).keys().iter().all(|key| !keys.contains(key)));
        }
        let untexted = tei::RerankRequest {
            return_text: false,
            ..plain
        };
        assert_eq!(read(&untexted).keys(), keys);
        assert!(RerankRows::read(Bytes::new(), &SOURCE).is_none());
    }

    #[test]
    fn a_response_without_one_of_the_texts_is_not_split() {
        let request = request(&["a", "b"]);
        let rows = read(&request);
        let mut response = response(&request, |_| 1.0);
        response.ranks[1].index = response.ranks[0].index;
        let headers = HeaderMap::new();
        let split = |response: &tei::RerankResponse| {
            rows.split(response.encode_to_vec().into(), &headers, 2)
        };
        assert!(split(&response).is_none());
        response.ranks[1].index = 7;
        assert!(split(&response).is_none());
        response.ranks.pop();
        assert!(split(&response).is_none());
    }

    proptest! {
        #[test]
        fn parts_join_to_the_whole(
            texts in proptest::collection::vec("[a-c]{0,3}", 1..12),
            cut in any::<u64>(),
        ) {
            let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
            let request = request(&texts);
            let rows = read(&request);
            let score = |text: &str| text.bytes().map(f32::from).sum::<f32>() - 150.0;
            let headers = HeaderMap::new();
            let mut found = vec![None; texts.len()];
            for side in [0, 1] {
                let indices: Vec<usize> =
                    (0..texts.len()).filter(|index| cut >> index & 1 == side).collect();
                if indices.is_empty() {
                    continue;
                }
                let part = rows.part(&indices);
                let part = tei::RerankRequest::decode(part.bytes()).unwrap();
                let response = response(&part, score).encode_to_vec();
                let split = rows.split(response.into(), &headers, indices.len()).unwrap();
                for (index, row) in indices.into_iter().zip(split.rows) {
                    found[index] = Some(row);
                }
            }
            let found: Vec<CachedRow> = found.into_iter().map(Option::unwrap).collect();
            let joined = rows.join(&found, &ComputedUsage::default(), &mut HeaderMap::new()).unwrap();
            let joined = tei::RerankResponse::decode(&joined[5..]).unwrap();
            prop_assert_eq!(joined, response(&request, score));
        }
    }
}
