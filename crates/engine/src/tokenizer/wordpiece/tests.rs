//! The tokenizers library is the reference: the same ids for all texts without a fallback to it.

use std::path::Path;
use std::sync::LazyLock;

use proptest::prelude::*;
use serde_json::{Value, json};
use tokenizers::utils::truncation::{TruncationParams, TruncationStrategy, truncate_encodings};
use tokenizers::{OffsetReferential, OffsetType, PostProcessor, PreTokenizedString, PreTokenizer};

use super::*;
use crate::error::EngineError;
use crate::tokenizer::{self, Text, TokenRow, Truncation};

/// Texts of many scripts, and of characters of no script.
const TEXTS: &[&str] = &[
    "",
    " ",
    "\t\n\r\u{b}\u{c}\u{85}\u{2028}\u{2029}\u{3000}",
    "The ferry left the harbour an hour late this morning.",
    "THE FERRY'S captain (a Mr. O'Neill) shouted: \"Wait!\"",
    "unaffable antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "Größe, Übergrößenträger, Straße, STRASSE, ẞ, naïve Äpfel",
    "Où êtes-vous, garçon ? L'œuvre d'Émile Zola… « J'accuse »",
    "Tôi không biết nói tiếng Việt; Nguyễn Đình Chiểu, ỗ ậ ữ",
    "Ὁ Σωκράτης φιλόσοφος ἦν· ΟΔΥΣΣΕΥΣ ὀδυσσεύς ς σ Σ ᾳ ᾼ ΐ",
    "\u{37e} \u{387} \u{1fef} \u{1ffd} \u{2000} \u{2126} \u{212a} \u{212b}",
    "Съешь же ещё этих мягких французских булок, да выпей чаю. Ё й Й Ї",
    "اَلْعَرَبِيَّةُ لغة جميلة؟ السَّلَامُ عَلَيْكُمْ، ﷺ ﻻ ٠١٢٣",
    "עִבְרִית שפה יפה; שָׁלוֹם עוֹלָם״ ׳ \u{fb2a} \u{fb4b}",
    "हिन्दी में लिखा हुआ वाक्य। क़ ख़ ग़ ज़ ड़ ढ़ फ़ ॐ",
    "বাংলা ভাষা। தமிழ் மொழி ೊ ౘ മലയാളം සිංහල ൊ ো",
    "ภาษาไทยไม่มีการเว้นวรรคระหว่างคำ น้ำ ๑๒๓",
    "ພາສາລາວ བོད་སྐད་ မြန်မာဘာသာ ភាសាខ្មែរ",
    "中文没有空格,所以每个字都是一个词。漢字カタカナ",
    "日本語のテキストです。がぎぐげご パピプペポ か\u{3099} ハ\u{309a} ｶﾞ",
    "한국어 문장입니다. 각 걂 힣 \u{1100}\u{1161}\u{11a8}",
    "\u{f900}\u{fa0e}\u{2f800}\u{2b820}\u{2b920}\u{3400}\u{20000}a\u{4e00}b",
    "👩\u{200d}👩\u{200d}👧\u{200d}👦 🏳\u{fe0f}\u{200d}🌈 👍🏽 🇩🇪 ☺\u{fe0f} 1\u{fe0f}\u{20e3}",
    "e\u{301} o\u{308}\u{304} a\u{304}\u{308} a\u{323}\u{302} \u{301}x \u{344}\u{345} x\u{345}\u{344}",
    "Z\u{351}\u{36b}\u{343}a\u{30c}\u{324}l\u{334}\u{317}g\u{321}\u{34f}o\u{315}\u{300}\u{5ae}",
    "İstanbul Iğdır ı i\u{307} I\u{307} İ\u{307} ŞIK",
    "ﬁne oﬃce ﬂow Ŀ ŀ ŉ ǆ ǅ Ǆ ĳ Ĳ",
    "Ｆｕｌｌ－ｗｉｄｔｈ　ＴＥＸＴ！？　１２３",
    "a\0b\u{1}c\u{7f}d\u{80}e\u{9f}f \0 \u{1} \u{7f}",
    "zero\u{200b}width\u{200c}non\u{200d}joiner\u{feff}\u{2060}\u{ad}soft\u{180e}",
    "\u{202e}right\u{202c} to \u{2066}left\u{2069} \u{200e}\u{200f}",
    "\u{fffd} a\u{fffd}b \u{fffc} \u{fffe} \u{ffff} \u{10ffff}",
    "\u{e000}private\u{f8ff}use\u{f0000}areas\u{10fffd}",
    "\u{d7ff}before\u{e000}and after surrogates\u{d7a3}\u{d7a4}",
    "𝓜𝓪𝓽𝓱 𝔏𝔢𝔱𝔱𝔢𝔯𝔰 𝟘𝟙𝟚 ℝ ℕ ∑ ∫ √2 ≠ ≮ ≯ ∄ x² H₂O",
    "𐐀𐐁𐐨 𞤀𞤢 Ꭰꭰ Ⴀⴀ ა Ა ꙁꙀ Ⓐⓐ Ⅷⅷ",
    "!!!??!?...,,,;;;:::---___***///\\\\\\|||~~~```^^^$$$+++===<<<>>>",
    "¿Qué? ¡Hola! «» “” ‘’ ‚„ ‹› – — ― … ‰ † ‡ • § ¶ © ® ™ € £ ¥ ₿",
    "https://example.org/a/b?c=d&e=f#g user@example.org +49-30-1234567 1,234.56 3.14e-10",
    "fn main() { let x: Vec<u8> = vec![1, 2]; } // snake_case CamelCase",
    "##ing ## # #ing ##a a##b ing",
    "[cls] [sep] [ CLS ] [CLS [SEP CLS] ] [ [1] [2, 3]",
    "it's don't we'll I'm they've o'clock rock'n'roll",
    "\u{302e}\u{302f}",
    "tone \u{1d165}\u{1d16d}",
    "\u{b95}\u{bcd}\u{bb7} \u{1b05}\u{1b35} \u{1b44} \u{a953} \u{1714} \u{1734}",
    "K\u{212a}k Å\u{212b}å Ω\u{2126}ω",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa b",
    "ああああああああああああああああああああああああああああああああああああああああああああああああああああああああああああああああああああああああああああああああああああああああああああああああああああ",
    "äöüäöüäöüäöüäöüäöüäöüäöüäöüäöüäöüäöüäöüäöüäöüäöüäöüäöüäöüäöüäöüäöüäöüäöüäöüäöüäöüäöüäöüäöüäöüäöüäöüä.äöü",
    "한한한한한한한한한한한한한한한한한한한한한한한한한한한한한한한한한한 한한한한한한한한한한한한한한한한한한한한한한한한한한한한한한한한한",
    "word\u{a0}word\u{2003}word\u{202f}word\u{205f}word\u{1680}word",
    "\u{300}",
    "\u{0}",
    "\u{300}\u{4e00}\u{300}",
    "\u{16fe4}\u{16ff0}\u{1133b} \u{8d3}\u{8e2} \u{1dfa} \u{10efd}",
    "\u{0f71}\u{0f73}\u{0f75}\u{0f81} \u{0344} \u{1f82}\u{345}",
    "ß ẞ ŉ ǰ ΐ ΰ և ẖ ẗ ẘ ẙ ẚ",
    "x\u{e0001}\u{e0020}\u{e007f}y\u{e0100}",
    "\u{9fff}\u{4dbf}\u{4dc0}\u{a000}\u{2a6df}\u{2a6e0}\u{2ceaf}\u{2ceb0}",
    "Wait - what?  two  spaces   three    four",
];

/// Pieces of random texts: what is rare among random characters.
const FRAGMENTS: &[&str] = &[
    "a", "ing", "##", "UN", "able", " ", "  ", "\n", "\0", ".", "'", "[", "]", "CLS", "é",
    "e\u{301}", "\u{323}", "\u{345}", "İ", "ß", "ſ", "中", "한", "\u{1100}", "\u{200d}", "👩",
    "\u{fffd}", "\u{37e}", "≠", "\u{302e}", "Σ", "\u{3000}",
];

fn minilm_bytes() -> Vec<u8> {
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models");
    std::fs::read(models.join("minilm/1/tokenizer.json")).expect("run `make models`")
}

fn minilm() -> Tokenizer {
    let mut tokenizer = Tokenizer::from_bytes(minilm_bytes()).unwrap();
    tokenizer.with_padding(None);
    tokenizer.with_truncation(None).unwrap();
    tokenizer
}

/// A tokenizer of few pieces, among them each of the texts' words and characters, so that a
/// difference between words is seen in the ids.
fn small(changes: &[(&str, Value)]) -> Vec<u8> {
    let mut tokens = vec!["[UNK]".to_owned(), "[CLS]".to_owned(), "[SEP]".to_owned()];
    for text in TEXTS.iter().chain(FRAGMENTS) {
        for text in [(*text).to_owned(), text.to_lowercase()] {
            tokens.extend(text.split_whitespace().map(str::to_owned));
            tokens.extend(text.chars().map(String::from));
            tokens.extend(text.chars().map(|it| format!("##{it}")));
        }
    }
    tokens.retain(|token| token != "b" && token != "##x");
    let mut vocabulary = serde_json::Map::new();
    for token in tokens {
        let next = vocabulary.len();
        vocabulary.entry(token).or_insert(next.into());
    }
    let special = |id, content| {
        json!({"id": id, "content": content, "special": true, "normalized": false,
            "single_word": false, "lstrip": false, "rstrip": false})
    };
    let mut tokenizer = json!({
        "version": "1.0",
        "added_tokens": [special(0, "[UNK]"), special(1, "[CLS]"), special(2, "[SEP]")],
        "normalizer": {"type": "BertNormalizer", "clean_text": true,
            "handle_chinese_chars": true, "strip_accents": null, "lowercase": true},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 2], "cls": ["[CLS]", 1]},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "vocab": vocabulary,
            "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    });
    for (path, value) in changes {
        *tokenizer.pointer_mut(path).unwrap() = value.clone();
    }
    serde_json::to_vec(&tokenizer).unwrap()
}

/// Every combination of the normalizer's settings.
fn normalizers() -> Vec<Value> {
    let mut all = Vec::new();
    for strip in [json!(null), json!(true), json!(false)] {
        for others in 0..8 {
            all.push(
                json!({"type": "BertNormalizer", "clean_text": others & 1 == 0,
                "handle_chinese_chars": others & 2 == 0, "lowercase": others & 4 == 0,
                "strip_accents": strip}),
            );
        }
    }
    all
}

fn reference(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
    tokenizer.encode_fast(text, false).unwrap().get_ids().into()
}

/// Whether the text needed no fallback to the library; then the ids must be the library's.
fn agrees(words: &WordPiece, tokenizer: &Tokenizer, text: &str) -> bool {
    let mut ids = vec![7];
    let done = words.encode(text, &mut ids);
    let mut expected = vec![7];
    if done {
        expected.extend(reference(tokenizer, text));
    }
    assert_eq!(ids, expected, "{text:?}");
    done
}

#[test]
fn texts_of_all_scripts_have_the_librarys_ids() {
    let mut tokenizers = vec![minilm()];
    for normalizer in normalizers() {
        let bytes = small(&[("/normalizer", normalizer)]);
        tokenizers.push(Tokenizer::from_bytes(bytes).unwrap());
    }
    for (prefix, word_max) in [("", 5), ("e", 1), ("no such", 0), ("#", 1000)] {
        let changes = [
            ("/model/continuing_subword_prefix", json!(prefix)),
            ("/model/max_input_chars_per_word", json!(word_max)),
        ];
        tokenizers.push(Tokenizer::from_bytes(small(&changes)).unwrap());
    }
    for tokenizer in tokenizers {
        let words = WordPiece::new(&tokenizer).unwrap();
        let left = TEXTS
            .iter()
            .filter(|text| !agrees(&words, &tokenizer, text));
        assert!(left.count() <= 4, "{:?}", tokenizer.get_normalizer());
    }
}

/// The words that the library's normalizer and pre-tokenizer split a text into.
fn library_words(tokenizer: &Tokenizer, text: &str) -> Vec<String> {
    let mut normalized = NormalizedString::from(text);
    let normalizer = tokenizer.get_normalizer().unwrap();
    normalizer.normalize(&mut normalized).unwrap();
    let mut split = PreTokenizedString::from(normalized);
    let pre_tokenizer = tokenizer.get_pre_tokenizer().unwrap();
    pre_tokenizer.pre_tokenize(&mut split).unwrap();
    let words = split.get_splits(OffsetReferential::Normalized, OffsetType::None);
    words
        .into_iter()
        .map(|(word, ..)| word.to_owned())
        .collect()
}

#[test]
fn every_character_has_the_class_that_the_library_gives_it() {
    for (number, normalizer) in normalizers().into_iter().enumerate() {
        let tokenizer = Tokenizer::from_bytes(small(&[("/normalizer", normalizer)])).unwrap();
        let words = WordPiece::new(&tokenizer).unwrap();
        // All with the usual one; with the others a part of the planes that have letters.
        let (last, step) = match number {
            0 => (0x10_ffff, 1),
            _ => (0x3_ffff, 8 + number),
        };
        let mut left = 0;
        for character in (0..=last).step_by(step).filter_map(char::from_u32) {
            let known = words.characters.get(character);
            let text = std::str::from_utf8(known.bytes()).unwrap();
            let expected = match known.class {
                CharacterClass::Word => vec![format!("a{text}b")],
                CharacterClass::Space => vec!["a".to_owned(), "b".to_owned()],
                CharacterClass::Isolated => vec!["a".to_owned(), text.to_owned(), "b".to_owned()],
                CharacterClass::Fallback => {
                    left += 1;
                    continue;
                }
            };
            let found = library_words(&tokenizer, &format!("a{character}b"));
            assert_eq!(found, expected, "{character:?}");
        }
        assert!(left <= 300, "{left} characters fall back to the library");
    }
}

#[test]
fn texts_that_may_have_an_added_token_fall_back_to_the_library() {
    let token = |id, content, normalized| {
        json!({"id": id, "content": content, "special": false, "normalized": normalized,
            "single_word": true, "lstrip": true, "rstrip": false})
    };
    let added = json!([
        token(0, "[UNK]", false),
        token(1, "É", false),
        token(2, "<Straße>", true)
    ]);
    let tokenizer = Tokenizer::from_bytes(small(&[("/added_tokens", added)])).unwrap();
    let words = WordPiece::new(&tokenizer).unwrap();
    for text in [
        "a [UNK]",
        "[UNK]",
        "É",
        "a\u{c9}b",
        "<strasse>",
        "a ≮ b",
        "x <STRAßE> y",
    ] {
        assert!(!agrees(&words, &tokenizer, text), "{text:?}");
    }
    for text in ["a [unk]", "[ UNK]", "é", "E\u{301}", "straße", "a > b"] {
        assert!(agrees(&words, &tokenizer, text), "{text:?}");
    }
}

#[test]
fn a_tokenizer_of_other_parts_is_not_supported() {
    let lowercase = json!({"type": "Lowercase"});
    let no_normalizer = json!(null);
    let whitespace = json!({"type": "WhitespaceSplit"});
    let truncated = json!({"max_length": 8, "strategy": "LongestFirst", "stride": 0});
    let word_level = json!({"type": "WordLevel", "unk_token": "[UNK]", "vocab": {"[UNK]": 0}});
    let blank = json!([{"id": 0, "content": " ", "special": false, "normalized": true,
        "single_word": false, "lstrip": false, "rstrip": false}]);
    for (path, value) in [
        ("/normalizer", lowercase),
        ("/normalizer", no_normalizer),
        ("/pre_tokenizer", whitespace),
        ("/model", word_level),
        ("/model/unk_token", json!("no such")),
        ("/added_tokens", blank),
    ] {
        let tokenizer = Tokenizer::from_bytes(small(&[(path, value)])).unwrap();
        assert!(WordPiece::new(&tokenizer).is_none(), "{path}");
    }
    let mut tokenizer = Tokenizer::from_bytes(small(&[])).unwrap();
    tokenizer
        .with_truncation(serde_json::from_value(truncated).unwrap())
        .unwrap();
    assert!(WordPiece::new(&tokenizer).is_none());
}

/// The row that the library makes of a text or a pair.
fn library_row(
    tokenizer: &tokenizer::Tokenizer,
    text: Text<'_>,
    truncation: Truncation,
) -> Result<TokenRow, EngineError> {
    let inner = &tokenizer.inner;
    let plain = |text: &str| inner.encode_fast(text, false).unwrap();
    let (first, second) = match text {
        Text::Single(text) => (plain(text), None),
        Text::Pair(first, second) => (plain(first), Some(plain(second))),
    };
    let processor = inner.get_post_processor();
    let added = processor.map_or(0, |processor| processor.added_tokens(second.is_some()));
    let tokens = first.len() + second.as_ref().map_or(0, tokenizers::Encoding::len) + added;
    let (mut first, mut second) = (first, second);
    if tokens > tokenizer.tokens_max {
        let (max_length, direction) = tokenizer.truncation(truncation, tokens, added)?;
        let params = TruncationParams {
            direction,
            max_length,
            strategy: TruncationStrategy::LongestFirst,
            stride: 0,
        };
        (first, second) = truncate_encodings(first, second, &params).unwrap();
    }
    let row = inner.post_process(first, second, true).unwrap();
    Ok(TokenRow {
        ids: row.get_ids().to_vec(),
        type_ids: row.get_type_ids().to_vec(),
        skipped: 0,
    })
}

/// Rows of texts and pairs, truncated and not, against the library's.
fn rows_agree(bytes: &[u8], texts: &[&str]) {
    let rules = tokenizer::TokenizerRules::of_file(512);
    let mut tokenizer = tokenizer::Tokenizer::from_bytes(bytes, 40_000, rules).unwrap();
    assert!(tokenizer.words.is_some() && tokenizer.template.is_some());
    for tokens_max in [0, 2, 3, 4, 5, 8, 13, 512] {
        tokenizer.tokens_max = tokens_max;
        let agree = |text| {
            for truncation in [Truncation::Refuse, Truncation::Right, Truncation::Left] {
                let fast = tokenizer.encode(text, truncation);
                let library = library_row(&tokenizer, text, truncation);
                let what = format!("{text:?} {truncation:?} {tokens_max}");
                assert_eq!(format!("{fast:?}"), format!("{library:?}"), "{what}");
            }
        };
        for first in texts {
            agree(Text::Single(first));
            for second in texts {
                agree(Text::Pair(first, second));
            }
        }
    }
}

#[test]
fn rows_of_texts_and_pairs_are_the_librarys() {
    let texts = [
        "",
        "a",
        "one two",
        "Straße, 中文!",
        "a b c d e f g h i j k l m n o p",
        "!!!!!",
    ];
    let piece = |id, type_id| json!({"SpecialToken": {"id": id, "type_id": type_id}});
    let text = |id, type_id| json!({"Sequence": {"id": id, "type_id": type_id}});
    let template = json!({"type": "TemplateProcessing",
        "single": [text("A", 3)],
        "pair": [piece("S", 4), text("B", 2), piece("S", 5), text("A", 1)],
        "special_tokens": {"S": {"id": "S", "ids": [2, 1], "tokens": ["[SEP]", "[CLS]"]}}});
    rows_agree(&minilm_bytes(), &texts);
    rows_agree(&small(&[]), &texts);
    rows_agree(&small(&[("/post_processor", json!(null))]), &texts);
    rows_agree(&small(&[("/post_processor", template)]), &texts);
}

#[test]
fn a_template_that_repeats_a_text_is_not_supported() {
    let text = json!({"Sequence": {"id": "A", "type_id": 0}});
    let second = json!({"Sequence": {"id": "B", "type_id": 0}});
    let template = json!({"type": "TemplateProcessing", "single": [text, text],
        "pair": [text, second], "special_tokens": {}});
    let roberta = json!({"type": "RobertaProcessing", "sep": ["[SEP]", 2], "cls": ["[CLS]", 1],
        "trim_offsets": true, "add_prefix_space": false});
    for processor in [template, roberta] {
        let bytes = small(&[("/post_processor", processor)]);
        let tokenizer = Tokenizer::from_bytes(bytes).unwrap();
        assert!(tokenizer::Template::learn(&tokenizer).is_none());
    }
}

/// Built once: that takes longer than the tokenization of many texts.
static BOTH: LazyLock<Vec<(Tokenizer, WordPiece)>> = LazyLock::new(|| {
    let small = Tokenizer::from_bytes(small(&[])).unwrap();
    let both = [minilm(), small].into_iter();
    both.map(|it| (it.clone(), WordPiece::new(&it).unwrap()))
        .collect()
});

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn random_texts_have_the_librarys_ids(
        any in proptest::collection::vec(any::<String>(), 64),
        mixed in proptest::collection::vec(
            proptest::collection::vec(proptest::sample::select(FRAGMENTS), 0..24), 64),
        drawn in proptest::collection::vec(
            proptest::collection::vec(proptest::sample::select(TEXTS), 0..4), 8),
    ) {
        for (tokenizer, words) in &*BOTH {
            let texts = mixed.iter().chain(&drawn).map(|parts| parts.concat());
            for text in texts.chain(any.iter().cloned()) {
                agrees(words, tokenizer, &text);
            }
        }
    }
}
