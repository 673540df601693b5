//! Special tokens and token types around the ids of a text, without the library.

use tokenizers::utils::truncation::TruncationDirection;
use tokenizers::{Encoding, PostProcessor, PostProcessorWrapper, Token, Tokenizer};

use super::TokenRow;

/// Ids that stand for the tokens of the first and of the second text while a template is learnt.
const TEXTS: [u32; 2] = [u32::MAX, u32::MAX - 1];
/// Lengths of the texts by which a learnt template is compared with the library.
const PROBES: [(usize, usize); 5] = [(0, 0), (1, 0), (0, 2), (2, 3), (5, 1)];

/// What the post-processor makes of one text and of a pair.
pub(crate) struct Template {
    single: Vec<Part>,
    pair: Vec<Part>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    /// A token that is there for every text.
    Special { id: u32, type_id: u32 },
    /// All tokens of a text, the first or the second, with this type.
    Text { second: bool, type_id: u32 },
}

impl Template {
    /// None for a post-processor of another kind than the usual two, or one that says a text twice
    /// or not at all.
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
            let (first, second) = (vec![TEXTS[0]; first], vec![TEXTS[1]; second]);
            for second in [None, Some(&second[..])] {
                if template.row(&first, second) != processed(tokenizer, &first, second)? {
                    return None;
                }
            }
        }
        Some(template)
    }

    /// How many tokens are added to those of the texts.
    pub(crate) fn added(&self, pair: bool) -> usize {
        let is_special = |part: &&Part| matches!(part, Part::Special { .. });
        self.parts(pair).iter().filter(is_special).count()
    }

    /// The row of one text or of two, given by their ids.
    pub(crate) fn row(&self, first: &[u32], second: Option<&[u32]>) -> TokenRow {
        let parts = self.parts(second.is_some());
        let length = first.len() + second.map_or(0, <[u32]>::len) + parts.len();
        let mut row = TokenRow {
            ids: Vec::with_capacity(length),
            type_ids: Vec::with_capacity(length),
        };
        for part in parts {
            let type_id = match *part {
                Part::Special { id, type_id } => {
                    row.ids.push(id);
                    type_id
                }
                Part::Text {
                    second: false,
                    type_id,
                } => {
                    row.ids.extend_from_slice(first);
                    type_id
                }
                Part::Text {
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

    fn parts(&self, pair: bool) -> &[Part] {
        match pair {
            false => &self.single,
            true => &self.pair,
        }
    }
}

/// What the library's post-processor does to one token of each text.
fn parts(tokenizer: &Tokenizer, pair: bool) -> Option<Vec<Part>> {
    let [first, second] = TEXTS;
    let row = processed(tokenizer, &[first], pair.then_some(&[second]))?;
    let tokens = row.ids.iter().zip(&row.type_ids);
    let parts: Vec<Part> = tokens
        .map(
            |(id, type_id)| match TEXTS.iter().position(|text| text == id) {
                None => Part::Special {
                    id: *id,
                    type_id: *type_id,
                },
                Some(text) => Part::Text {
                    second: text == 1,
                    type_id: *type_id,
                },
            },
        )
        .collect();
    let times = |text: &u32| row.ids.iter().filter(|id| *id == text).count();
    (TEXTS.iter().map(times).eq([1, usize::from(pair)])).then_some(parts)
}

/// The library's row of texts that are given by their ids, on the way that texts take.
fn processed(tokenizer: &Tokenizer, first: &[u32], second: Option<&[u32]>) -> Option<TokenRow> {
    let plain = |ids: &[u32]| {
        let token = |id: &u32| Token::new(*id, String::new(), (0, 0));
        let encoding = Encoding::from_tokens(ids.iter().map(token).collect(), 0);
        tokenizer.post_process(encoding, None, false).ok()
    };
    let second = match second {
        Some(ids) => Some(plain(ids)?),
        None => None,
    };
    let row = tokenizer.post_process(plain(first)?, second, true).ok()?;
    Some(TokenRow {
        ids: row.get_ids().to_vec(),
        type_ids: row.get_type_ids().to_vec(),
    })
}

/// How many tokens of each text are kept where both together may have `tokens_max`: the longer one
/// gives first, then both have half, and of an odd number the longer one has one more.
pub(crate) fn shares(first: usize, second: usize, tokens_max: usize) -> (usize, usize) {
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

/// Keeps this many ids, of the beginning or of the end.
pub(crate) fn cut(ids: &mut Vec<u32>, kept: usize, direction: TruncationDirection) {
    match direction {
        TruncationDirection::Right => ids.truncate(kept),
        TruncationDirection::Left => {
            ids.drain(..ids.len().saturating_sub(kept));
        }
    }
}
