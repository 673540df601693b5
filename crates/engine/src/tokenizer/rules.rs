//! The settings beside a `tokenizer.json` that change what it does, as transformers and
//! sentence-transformers apply them.

use tokenizers::normalizers::{Lowercase, Sequence};
use tokenizers::{NormalizerWrapper, PreTokenizerWrapper, Tokenizer};

/// What the configuration files of a folder say of its tokenizer, above its `tokenizer.json`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TokenizerRules {
    /// Whether capitals become small letters, by `tokenizer_config.json`.
    pub(crate) lowercase: Option<bool>,
    /// Whether accents are removed.
    pub(crate) strip_accents: Option<bool>,
    /// Whether ideographs are words of their own.
    pub(crate) handle_chinese_chars: Option<bool>,
    /// Whether a text begins with a space.
    pub(crate) add_prefix_space: Option<bool>,
    /// Whether capitals become small letters before anything else, as sentence-transformers does.
    pub(crate) lowercase_first: bool,
    /// Whether the model is given token types; else all are 0.
    pub(crate) token_types: bool,
    /// Whether the tokens of a prompt are pooled.
    pub(crate) include_prompt: bool,
    /// The maximum number of tokens of a row.
    pub(crate) tokens_max: usize,
}

impl TokenizerRules {
    /// Rules of a tokenizer that is as its own file says.
    #[cfg(test)]
    pub(crate) fn of_file(tokens_max: usize) -> Self {
        Self {
            lowercase: None,
            strip_accents: None,
            handle_chinese_chars: None,
            add_prefix_space: None,
            lowercase_first: false,
            token_types: true,
            include_prompt: true,
            tokens_max,
        }
    }

    /// Changes a tokenizer. The error is the reason, for a message about its file.
    pub(super) fn apply(&self, tokenizer: &mut Tokenizer) -> Result<(), String> {
        let mut after = tokenizer.get_normalizer().cloned();
        let mut changed = false;
        // transformers changes these settings of BERT's normalizer, and of no other.
        if let Some(NormalizerWrapper::BertNormalizer(bert)) = &mut after {
            let own = *bert;
            bert.lowercase = self.lowercase.unwrap_or(own.lowercase);
            bert.strip_accents = self.strip_accents.or(own.strip_accents);
            bert.handle_chinese_chars = self
                .handle_chinese_chars
                .unwrap_or(own.handle_chinese_chars);
            changed = bert.lowercase != own.lowercase
                || bert.strip_accents != own.strip_accents
                || bert.handle_chinese_chars != own.handle_chinese_chars;
        }
        if self.lowercase_first && !after.as_ref().is_some_and(lowercases) {
            let mut all = vec![NormalizerWrapper::Lowercase(Lowercase)];
            match after {
                Some(NormalizerWrapper::Sequence(others)) => all.extend(others),
                others => all.extend(others),
            }
            after = Some(NormalizerWrapper::Sequence(Sequence::new(all)));
            changed = true;
        }
        if changed {
            let set = tokenizer.with_normalizer(after);
            set.map_err(|error| error.to_string())?;
        }
        if let (Some(space), Some(PreTokenizerWrapper::ByteLevel(words))) =
            (self.add_prefix_space, tokenizer.get_pre_tokenizer())
        {
            let mut words = *words;
            words.add_prefix_space = space;
            tokenizer.with_pre_tokenizer(Some(words));
        }
        Ok(())
    }
}

/// Whether a normalizer makes small letters of capitals.
fn lowercases(normalizer: &NormalizerWrapper) -> bool {
    match normalizer {
        NormalizerWrapper::Lowercase(_) => true,
        NormalizerWrapper::BertNormalizer(bert) => bert.lowercase,
        NormalizerWrapper::Sequence(all) => all.as_ref().iter().any(lowercases),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::tokenizer::{Text, Tokenizer as Own, Truncation};

    /// The tokens of a text by a tokenizer with this normalizer and these rules.
    fn tokens(normalizer: &Value, rules: TokenizerRules, text: &str) -> Vec<String> {
        let words = [
            "[UNK]",
            "Ab",
            "ab",
            "\u{e4}b",
            "\u{c4}b",
            "\u{6f22}",
            "\u{6f22}ab",
        ];
        let ids = words.iter().enumerate();
        let vocabulary: serde_json::Map<String, Value> = ids
            .map(|(id, word)| ((*word).to_owned(), json!(id)))
            .collect();
        let file = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
            "normalizer": normalizer, "pre_tokenizer": {"type": "Whitespace"}, "decoder": null,
            "post_processor": null,
            "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"},
        });
        let own = Own::from_bytes(file.to_string().as_bytes(), 16, rules).unwrap();
        let row = own.encode(Text::Single(text), Truncation::Refuse).unwrap();
        row.ids
            .iter()
            .map(|id| words[*id as usize].to_owned())
            .collect()
    }

    fn bert(lowercase: bool) -> Value {
        json!({"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
            "strip_accents": null, "lowercase": lowercase})
    }

    #[test]
    fn tokenizer_config_wins_over_the_normalizer_of_bert() {
        let own = TokenizerRules::of_file(8);
        let lower = TokenizerRules {
            lowercase: Some(true),
            ..own
        };
        assert_eq!(tokens(&bert(false), own, "Ab"), ["Ab"]);
        assert_eq!(tokens(&bert(false), lower, "Ab"), ["ab"]);
        let cased = TokenizerRules {
            lowercase: Some(false),
            ..own
        };
        assert_eq!(tokens(&bert(true), cased, "Ab"), ["Ab"]);
        // Accents go with capitals, unless a file says otherwise.
        assert_eq!(tokens(&bert(true), own, "\u{c4}b"), ["ab"]);
        let accents = TokenizerRules {
            strip_accents: Some(false),
            ..own
        };
        assert_eq!(tokens(&bert(true), accents, "\u{c4}b"), ["\u{e4}b"]);
        let joined = TokenizerRules {
            handle_chinese_chars: Some(false),
            ..own
        };
        assert_eq!(tokens(&bert(true), own, "\u{6f22}ab"), ["\u{6f22}", "ab"]);
        assert_eq!(tokens(&bert(true), joined, "\u{6f22}ab"), ["\u{6f22}ab"]);
    }

    #[test]
    fn sentence_transformers_lowercases_before_the_normalizer() {
        let first = TokenizerRules {
            lowercase_first: true,
            ..TokenizerRules::of_file(8)
        };
        assert_eq!(tokens(&Value::Null, first, "Ab"), ["ab"]);
        // The accents stay, as those of a normalizer that does not lowercase.
        assert_eq!(tokens(&bert(false), first, "\u{c4}b"), ["\u{e4}b"]);
        assert_eq!(tokens(&bert(true), first, "\u{c4}b"), ["ab"]);
        let nfc = json!({"type": "Sequence", "normalizers": [{"type": "NFC"}]});
        assert_eq!(tokens(&nfc, first, "Ab"), ["ab"]);
    }

    #[test]
    fn a_byte_level_tokenizer_begins_with_a_space_if_the_files_say_so() {
        let file = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
            "normalizer": null, "decoder": null, "post_processor": null,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false,
                "trim_offsets": true, "use_regex": true},
            "model": {"type": "BPE", "vocab": {"a": 0, "\u{120}": 1, "\u{120}a": 2},
                "merges": ["\u{120} a"], "unk_token": null},
        });
        let ids = |add_prefix_space| {
            let rules = TokenizerRules {
                add_prefix_space,
                ..TokenizerRules::of_file(8)
            };
            let own = Own::from_bytes(file.to_string().as_bytes(), 16, rules).unwrap();
            own.encode(Text::Single("a"), Truncation::Refuse)
                .unwrap()
                .ids
        };
        assert_eq!(ids(None), [0]);
        assert_eq!(ids(Some(true)), [2]);
    }

    /// A tokenizer of one word.
    fn words() -> Value {
        json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
            "normalizer": null, "pre_tokenizer": {"type": "Whitespace"}, "decoder": null,
            "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 1], "cls": ["[CLS]", 0]},
            "model": {"type": "WordLevel", "vocab": {"[CLS]": 0, "[SEP]": 1, "a": 2},
                "unk_token": "a"},
        })
    }

    #[test]
    fn a_prompt_is_skipped_where_pooling_leaves_it_out() {
        let file = words();
        let skipped = |include_prompt| {
            let rules = TokenizerRules {
                include_prompt,
                ..TokenizerRules::of_file(8)
            };
            let own = Own::from_bytes(file.to_string().as_bytes(), 16, rules).unwrap();
            own.skipped("a a").unwrap()
        };
        // The token before the prompt is left out with it.
        assert_eq!(skipped(false), 3);
        assert_eq!(skipped(true), 0);
    }

    #[test]
    fn rows_have_no_token_types_where_the_model_takes_none() {
        let file = words();
        let types = |token_types| {
            let rules = TokenizerRules {
                token_types,
                ..TokenizerRules::of_file(8)
            };
            let own = Own::from_bytes(file.to_string().as_bytes(), 16, rules).unwrap();
            let row = own.encode(Text::Pair("a", "a"), Truncation::Refuse);
            row.unwrap().type_ids
        };
        assert_eq!(types(true), [0, 0, 0, 1, 1]);
        assert_eq!(types(false), [0, 0, 0, 0, 0]);
    }
}
