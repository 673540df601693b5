//! The common parts of calls of texts: truncation, prompts, and the metadata with
//! the usage of a response.

use http::{HeaderMap, HeaderName, HeaderValue};

use crate::tei::v1::{Metadata, TruncationDirection};
use crate::words::cut;
use crate::{Error, FieldPath, TOKENS_KEY};

/// Metadata key with the kind of device that computed a response: `cpu`, `gpu`
/// or `provider`.
pub const COMPUTE_TYPE_KEY: &str = "x-compute-type";

/// The parameter, or the field, with the name of a prompt: a text of the model's
/// configuration that is put before each text.
pub const PROMPT_NAME: &str = "prompt_name";
/// The parameter, or the field, with a prompt itself.
pub const PROMPT: &str = "prompt";
/// Names of prompts that an error lists.
const LISTED_PROMPTS_MAX: usize = 8;

/// The error of a prompt that the model does not have; it lists the names of
/// those that it has.
pub fn unknown_prompt<'n>(
    field: impl Into<FieldPath>,
    known: impl ExactSizeIterator<Item = &'n str>,
) -> Error {
    let count = known.len();
    if count == 0 {
        return Error::invalid(field, "must not be set: the model has no prompts");
    }
    let listed: Vec<_> = known.take(LISTED_PROMPTS_MAX).map(cut).collect();
    let mut reason = format!("must be one of the model's prompts: {}", listed.join(", "));
    if count > listed.len() {
        reason = format!("{reason} and {} more", count - listed.len());
    }
    Error::invalid(field, reason)
}

/// The end of a long text that is truncated.
pub fn truncation_direction(direction: i32) -> Result<TruncationDirection, Error> {
    TruncationDirection::try_from(direction)
        .map_err(|_| Error::invalid("truncation_direction", "must be 0 (right) or 1 (left)"))
}

/// Adds what a response took as metadata, in Text Embeddings Inference's names:
/// characters, tokens, and times in milliseconds. `tokens` are those that this
/// call computed, which may be fewer than those of `took`.
pub fn insert_compute_metadata(
    headers: &mut HeaderMap,
    compute_type: Option<HeaderValue>,
    tokens: u64,
    took: &Metadata,
) {
    let ms = |ns: u64| HeaderValue::from(ns / 1_000_000);
    if let Some(compute_type) = compute_type {
        headers.insert(COMPUTE_TYPE_KEY, compute_type);
    }
    headers.insert(TOKENS_KEY, tokens.into());
    for (name, value) in [
        ("x-compute-characters", took.compute_chars.into()),
        ("x-compute-time", ms(took.total_time_ns)),
        ("x-total-time", ms(took.total_time_ns)),
        ("x-tokenization-time", ms(took.tokenization_time_ns)),
        ("x-queue-time", ms(took.queue_time_ns)),
        ("x-inference-time", ms(took.inference_time_ns)),
    ] {
        headers.insert(HeaderName::from_static(name), value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_response_took_is_metadata() {
        let took = Metadata {
            compute_chars: 6,
            compute_tokens: 9,
            total_time_ns: 12_900_000,
            queue_time_ns: 1_000_000,
            ..Default::default()
        };
        let mut headers = HeaderMap::new();
        let device = Some(HeaderValue::from_static("cpu"));
        insert_compute_metadata(&mut headers, device, 3, &took);
        for (name, value) in [
            (COMPUTE_TYPE_KEY, "cpu"),
            ("x-compute-characters", "6"),
            (TOKENS_KEY, "3"),
            ("x-compute-time", "12"),
            ("x-total-time", "12"),
            ("x-tokenization-time", "0"),
            ("x-queue-time", "1"),
            ("x-inference-time", "0"),
        ] {
            assert_eq!(headers[name], value, "{name}");
        }
        assert_eq!(headers.len(), 8);
    }

    #[test]
    fn an_unknown_prompt_is_told_the_known_ones_up_to_a_bound() {
        let reason = |names: &[String]| {
            let error = unknown_prompt(PROMPT_NAME, names.iter().map(String::as_str));
            assert_eq!(error.field().unwrap(), "prompt_name");
            error.violation().unwrap().description.clone()
        };
        let names: Vec<String> = (0..10).map(|number| format!("task{number}")).collect();
        assert_eq!(reason(&[]), "must not be set: the model has no prompts");
        assert_eq!(
            reason(&names[..2]),
            "must be one of the model's prompts: task0, task1"
        );
        let many = reason(&names);
        assert!(many.ends_with("task6, task7 and 2 more"), "{many}");
        let long = vec!["\u{fc}".repeat(1 << 20); 3];
        assert!(reason(&long).len() < 2048);
    }

    #[test]
    fn a_direction_is_right_or_left() {
        assert_eq!(truncation_direction(0), Ok(TruncationDirection::Right));
        assert_eq!(truncation_direction(1), Ok(TruncationDirection::Left));
        let error = truncation_direction(2).unwrap_err();
        assert_eq!(error.field().unwrap(), "truncation_direction");
    }
}
