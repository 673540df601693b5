//! `Rerank` of `tei.v1`: each text with the query is a row.

use bytes::Bytes;
use http::HeaderMap;
use platform::grpc::{Message, frame};
use prost::Message as _;
use protocol::tei::v1 as tei;

use super::super::key::{Key, KeyWriter, Source};
use super::super::memory::Row;
use super::{Paid, ROWS_MAX, Rows, Split, compute_type, text_headers};

/// A query and its texts.
#[derive(Debug)]
pub struct Rerank {
    request: tei::RerankRequest,
    keys: Vec<Key>,
}

impl Rerank {
    /// Reads a message; none when it is no such request.
    pub fn read(message: Bytes, source: &Source<'_>) -> Option<Box<dyn Rows>> {
        let bytes = message.len();
        let request = tei::RerankRequest::decode(message).ok()?;
        // Fields that are unknown here may change the answer.
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
        let place = writer.fold();
        let keys = request.texts.iter().map(|text| {
            writer.back(place);
            writer.part(text.as_bytes()).key()
        });
        let keys = keys.collect();
        Some(Box::new(Self { request, keys }))
    }
}

impl Rows for Rerank {
    fn keys(&self) -> &[Key] {
        &self.keys
    }

    fn part(&self, places: &[usize]) -> Message {
        let texts = places
            .iter()
            .filter_map(|&place| self.request.texts.get(place).cloned());
        Message::encode(&tei::RerankRequest {
            query: self.request.query.clone(),
            texts: texts.collect(),
            truncate: self.request.truncate,
            raw_scores: self.request.raw_scores,
            return_text: false,
            truncation_direction: self.request.truncation_direction,
        })
    }

    /// The head is the kind of device, the content the score.
    fn split(&self, answer: Bytes, headers: &HeaderMap, count: usize) -> Option<Split> {
        let answer = tei::RerankResponse::decode(answer).ok()?;
        if answer.ranks.len() != count {
            return None;
        }
        let mut scores = vec![None; count];
        for rank in &answer.ranks {
            let place = scores.get_mut(usize::try_from(rank.index).ok()?)?;
            if place.replace(rank.score).is_some() {
                return None;
            }
        }
        let head = Bytes::copy_from_slice(compute_type(headers));
        let rows = scores.into_iter().map(|score: Option<f32>| {
            Some(Row {
                head: head.clone(),
                content: Bytes::copy_from_slice(&score?.to_le_bytes()),
            })
        });
        Some(Split {
            rows: rows.collect::<Option<_>>()?,
            took: answer.metadata.unwrap_or_default(),
        })
    }

    fn join(&self, rows: &[Row], paid: &Paid, headers: &mut HeaderMap) -> Option<Bytes> {
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
        // As a worker does: equal scores stay in the order of the request.
        ranks.sort_by(|a, b| b.score.total_cmp(&a.score));
        let kind = rows.first().map(|row| row.head.clone()).unwrap_or_default();
        text_headers(&kind, paid.took.compute_chars, paid, headers);
        Some(frame(&tei::RerankResponse {
            ranks,
            metadata: Some(paid.took),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SOURCE: Source<'_> = Source {
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

    fn read(request: &tei::RerankRequest) -> Box<dyn Rows> {
        Rerank::read(request.encode_to_vec().into(), &SOURCE).unwrap()
    }

    /// As a worker answers.
    fn answer(request: &tei::RerankRequest, score: impl Fn(&str) -> f32) -> tei::RerankResponse {
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
    fn the_query_and_the_ways_of_scoring_change_every_key() {
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
        assert!(Rerank::read(Bytes::new(), &SOURCE).is_none());
    }

    #[test]
    fn an_answer_that_lacks_a_text_is_no_answer() {
        let request = request(&["a", "b"]);
        let rows = read(&request);
        let mut answer = answer(&request, |_| 1.0);
        answer.ranks[1].index = answer.ranks[0].index;
        let headers = HeaderMap::new();
        let split =
            |answer: &tei::RerankResponse| rows.split(answer.encode_to_vec().into(), &headers, 2);
        assert!(split(&answer).is_none());
        answer.ranks[1].index = 7;
        assert!(split(&answer).is_none());
        answer.ranks.pop();
        assert!(split(&answer).is_none());
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
                let places: Vec<usize> =
                    (0..texts.len()).filter(|place| cut >> place & 1 == side).collect();
                if places.is_empty() {
                    continue;
                }
                let part = rows.part(&places);
                let part = tei::RerankRequest::decode(part.bytes()).unwrap();
                let answered = answer(&part, score).encode_to_vec();
                let split = rows.split(answered.into(), &headers, places.len()).unwrap();
                for (place, row) in places.into_iter().zip(split.rows) {
                    found[place] = Some(row);
                }
            }
            let found: Vec<Row> = found.into_iter().map(Option::unwrap).collect();
            let joined = rows.join(&found, &Paid::default(), &mut HeaderMap::new()).unwrap();
            let joined = tei::RerankResponse::decode(&joined[5..]).unwrap();
            prop_assert_eq!(joined, answer(&request, score));
        }
    }
}
