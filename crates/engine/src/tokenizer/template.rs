//! The post-processing of a tokenizer without the library: special tokens and token types around
//! the ids of a text.

use tokenizers::utils::truncation::TruncationDirection;
use tokenizers::{Encoding, PostProcessor, PostProcessorWrapper, Token, Tokenizer};

use super::TokenRow;

/// The ids of the special tokens before and after a single text; none where the post-processor
/// repeats or omits it.
pub(super) fn around(tokenizer: &Tokenizer) -> Option<(Vec<u32>, Vec<u32>)> {
    let [text, _] = PLACEHOLDERS;
    let ids = post_processed(tokenizer, &[text], None).ok()?.ids;
    let mut parts = ids.split(|id| *id == text).map(<[u32]>::to_vec);
    let around = (parts.next()?, parts.next()?);
    parts.next().is_none().then_some(around)
}

/// Ids in place of the tokens of the first and of the second text while a template is learned.
const PLACEHOLDERS: [u32; 2] = [u32::MAX, u32::MAX - 1];
/// Lengths of the texts with which a learned template is compared with the library.
const PROBES: [(usize, usize); 5] = [(0, 0), (1, 0), (0, 2), (2, 3), (5, 1)];

/// The post-processor's template of a single text and of a pair.
pub(crate) struct Template {
    single: Vec<TemplatePart>,
    pair: Vec<TemplatePart>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TemplatePart {
    /// A special token.
    Special { id: u32, type_id: u32 },
    /// All tokens of a text, the first or the second, with this type.
    Text { second: bool, type_id: u32 },
}

impl Template {
    /// None for a post-processor of another kind than the usual two, or one that repeats or omits a
    /// text.
    pub(crate) fn learn(tokenizer: &Tokenizer) -> Option<Self> {
        match tokenizer.get_post_processor() {
            None | Some(PostProcessorWrapper::Bert(_) | PostProcessorWrapper::Template(_)) => {}
            Some(_) => return None,
        }
        let template = Self {
            single: parts(tokenizer, false)?,
            pair: parts(tokenizer, true)?,
        };
        let added = |pair| {
            let processor = tokenizer.get_post_processor();
            processor.map_or(0, |processor| processor.added_tokens(pair))
        };
        if [false, true].map(added) != [false, true].map(|pair| template.added(pair)) {
            return None;
        }
        for (first, second) in PROBES {
            let (first, second) = (vec![PLACEHOLDERS[0]; first], vec![PLACEHOLDERS[1]; second]);
            for second in [None, Some(&second[..])] {
                if template.row(&first, second) != post_processed(tokenizer, &first, second).ok()? {
                    return None;
                }
            }
        }
        Some(template)
    }

    /// The number of special tokens.
    pub(crate) fn added(&self, pair: bool) -> usize {
        let is_special = |part: &&TemplatePart| matches!(part, TemplatePart::Special { .. });
        self.parts(pair).iter().filter(is_special).count()
    }

    /// The row of one text or of two, given by their ids.
    pub(crate) fn row(&self, first: &[u32], second: Option<&[u32]>) -> TokenRow {
        let parts = self.parts(second.is_some());
        let length = first.len() + second.map_or(0, <[u32]>::len) + parts.len();
        let mut row = TokenRow {
            ids: Vec::with_capacity(length),
            type_ids: Vec::with_capacity(length),
            skipped: 0,
        };
        for part in parts {
            let type_id = match *part {
                TemplatePart::Special { id, type_id } => {
                    row.ids.push(id);
                    type_id
                }
                TemplatePart::Text {
                    second: false,
                    type_id,
                } => {
                    row.ids.extend_from_slice(first);
                    type_id
                }
                TemplatePart::Text {
                    second: true,
                    type_id,
                } => {
                    row.ids.extend_from_slice(second.unwrap_or_default());
                    type_id
                }
            };
            row.type_ids.resize(row.ids.len(), type_id);
        }
        row
    }

    fn parts(&self, pair: bool) -> &[TemplatePart] {
        if pair { &self.pair } else { &self.single }
    }
}

/// The template by which the library's post-processor surrounds one token of each text.
fn parts(tokenizer: &Tokenizer, pair: bool) -> Option<Vec<TemplatePart>> {
    let [first, second] = PLACEHOLDERS;
    let row = post_processed(tokenizer, &[first], pair.then_some(&[second])).ok()?;
    let tokens = row.ids.iter().zip(&row.type_ids);
    let parts: Vec<TemplatePart> = tokens
        .map(
            |(id, type_id)| match PLACEHOLDERS.iter().position(|text| text == id) {
                None => TemplatePart::Special {
                    id: *id,
                    type_id: *type_id,
                },
                Some(text) => TemplatePart::Text {
                    second: text == 1,
                    type_id: *type_id,
                },
            },
        )
        .collect();
    let times = |text: &u32| row.ids.iter().filter(|id| *id == text).count();
    (PLACEHOLDERS.iter().map(times).eq([1, usize::from(pair)])).then_some(parts)
}

/// The library's row of texts that are given by their ids.
pub(super) fn post_processed(
    tokenizer: &Tokenizer,
    first: &[u32],
    second: Option<&[u32]>,
) -> Result<TokenRow, String> {
    let failed = |error: tokenizers::Error| error.to_string();
    let plain = |ids: &[u32]| {
        let token = |id: &u32| Token::new(*id, String::new(), (0, 0));
        let encoding = Encoding::from_tokens(ids.iter().map(token).collect(), 0);
        tokenizer
            .post_process(encoding, None, false)
            .map_err(failed)
    };
    let second = match second {
        Some(ids) => Some(plain(ids)?),
        None => None,
    };
    let row = tokenizer.post_process(plain(first)?, second, true);
    let row = row.map_err(failed)?;
    Ok(TokenRow {
        ids: row.get_ids().to_vec(),
        type_ids: row.get_type_ids().to_vec(),
        skipped: 0,
    })
}

/// The lengths of two texts after truncation to `tokens_max` tokens together, longest first: the
/// longer one is truncated down to the shorter one, then both to half, and of an odd number the
/// longer one has one more.
pub(crate) fn truncated_lengths(first: usize, second: usize, tokens_max: usize) -> (usize, usize) {
    if first + second <= tokens_max {
        return (first, second);
    }
    let shorter = first.min(second).min(tokens_max / 2);
    let longer = tokens_max - shorter;
    if first > second {
        (longer, shorter)
    } else {
        (shorter, longer)
    }
}

/// Ids truncated to this length, on the right or on the left.
pub(crate) fn truncated(ids: &[u32], length: usize, direction: TruncationDirection) -> &[u32] {
    let range = match direction {
        TruncationDirection::Right => 0..length.min(ids.len()),
        TruncationDirection::Left => ids.len().saturating_sub(length)..ids.len(),
    };
    ids.get(range).unwrap_or_default()
}
