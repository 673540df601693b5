//! Long and hostile texts: the ids and tokens are the library's, in linear time.

use std::cell::Cell;
use std::time::Duration;

use serde_json::{Value, json};

use super::*;

fn added(id: usize, content: &str, normalized: bool, lstrip: bool) -> Value {
    json!({"id": id, "content": content, "special": !normalized, "normalized": normalized,
        "single_word": false, "lstrip": lstrip, "rstrip": content == "<right>"})
}

/// A tokenizer of BERT's kind.
fn bert() -> Tokenizer {
    let tokens = [
        "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "##a", "##b", "word", ".",
    ];
    let vocabulary: serde_json::Map<_, _> = tokens
        .iter()
        .enumerate()
        .map(|(id, token)| ((*token).to_owned(), id.into()))
        .collect();
    let special = |id: usize| added(id, tokens[id], false, false);
    tokenizer(json!({
        "version": "1.0",
        "added_tokens": [special(0), special(1), special(2), special(3), special(4)],
        "normalizer": {"type": "BertNormalizer", "clean_text": true,
            "handle_chinese_chars": true, "strip_accents": null, "lowercase": true},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "vocab": vocabulary,
            "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    }))
}

/// A tokenizer of RoBERTa's kind, whose mask takes the spaces before it.
fn roberta() -> Tokenizer {
    let mut vocabulary = serde_json::Map::new();
    let special = ["<s>", "</s>", "<mask>", "<right>", "<plain>"];
    let letters = [
        "a", "b", "w", "o", "r", "d", ".", "Ġ", "Ì", "ģ", "Ċ", "ab", "Ġa", "Ġw",
    ];
    for token in special.iter().chain(&letters) {
        let next = vocabulary.len();
        vocabulary.insert((*token).to_owned(), next.into());
    }
    tokenizer(json!({
        "version": "1.0",
        "added_tokens": [added(0, "<s>", false, false), added(1, "</s>", false, false),
            added(2, "<mask>", false, true), added(3, "<right>", false, false),
            added(4, "<plain>", true, false)],
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true,
            "use_regex": true},
        "post_processor": {"type": "RobertaProcessing", "sep": ["</s>", 1], "cls": ["<s>", 0],
            "trim_offsets": true, "add_prefix_space": true},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": ["a b", "Ġ a", "Ġ w"],
            "unk_token": null}
    }))
}

fn tokenizer(json: Value) -> Tokenizer {
    Tokenizer::from_bytes(
        &serde_json::to_vec(&json).unwrap(),
        64,
        TokenizerRules::of_file(1 << 30),
    )
    .unwrap()
}

/// A text of random pieces, longer than a part; xorshift.
fn random_text(seed: u64) -> String {
    const PIECES: [&str; 16] = [
        "a",
        "b",
        "ab",
        " ",
        "  ",
        "word",
        ".",
        "[MASK]",
        "<mask>",
        "<right>",
        "<plain>",
        "[",
        "<",
        "\n",
        "a\u{301}",
        " a b a b word",
    ];
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut text = String::new();
    while text.len() < 3 * PART_BYTES {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        // Some texts have few added tokens, so that their parts are cut between words.
        let rare = seed.is_multiple_of(2) && !state.is_multiple_of(251);
        let piece = PIECES[(state >> 32) as usize % PIECES.len()];
        text.push_str(if rare { " ab" } else { piece });
    }
    text
}

#[test]
fn parts_of_a_text_have_the_librarys_tokens() {
    for tokenizer in [bert(), roberta()] {
        let segments = tokenizer.segments.as_ref().unwrap();
        for seed in 0..24 {
            let text = random_text(seed);
            let parts: Vec<_> = segments.of(&text).collect();
            assert!(parts.len() > 2, "{seed}");
            assert_eq!(parts.iter().map(Segment::text).collect::<String>(), text);
            let expected = tokenizer.inner.encode_fast(text.as_str(), false).unwrap();
            let ids = tokenizer.ids(&text, &|| true).unwrap();
            assert_eq!(ids, expected.get_ids(), "{seed}");
            for special in [false, true] {
                let expected = tokenizer.tokens_with_library(&text, special).unwrap();
                let tokens = tokenizer.tokens(&text, special, &|| true).unwrap();
                for (index, (token, expected)) in tokens.iter().zip(&expected).enumerate() {
                    assert_eq!(token.id, expected.id, "{seed} {index}");
                    // After an added token, the library trims a space that is not there.
                    let added = index > 0 && tokens[index - 1].id < 5;
                    assert!(
                        token == expected || tokenizer.trims && added,
                        "{seed} {index}"
                    );
                }
                assert_eq!(tokens.len(), expected.len());
            }
        }
    }
}

#[test]
fn a_tokenizer_whose_added_tokens_depend_on_words_is_not_cut() {
    let mut json: Value = serde_json::from_str(&bert().inner.to_string(false).unwrap()).unwrap();
    json["added_tokens"][4]["single_word"] = true.into();
    assert!(tokenizer(json.clone()).segments.is_none());
    json["added_tokens"][4]["single_word"] = false.into();
    json["pre_tokenizer"] = json!({"type": "Whitespace"});
    assert!(tokenizer(json).segments.is_none());
}

#[test]
fn work_on_a_long_text_ends_when_its_caller_has_left() {
    for tokenizer in [bert(), roberta()] {
        for text in ["[MASK]<mask>".repeat(20_000), "word a ".repeat(50_000)] {
            let asked = Cell::new(0);
            let leaves = || {
                asked.set(asked.get() + 1);
                asked.get() < 3
            };
            assert_eq!(tokenizer.ids(&text, &leaves), Err(EngineError::Cancelled));
            assert_eq!(asked.get(), 3);
            let tokens = tokenizer.tokens(&text, true, &leaves);
            assert_eq!(tokens, Err(EngineError::Cancelled));
        }
    }
}

#[test]
fn ids_make_the_row_of_their_text() {
    for tokenizer in [bert(), roberta()] {
        for text in ["word a b", "", "a[MASK] <mask>b"] {
            let row = tokenizer
                .encode(Text::Single(text), Truncation::Refuse)
                .unwrap();
            let ids = tokenizer.ids(text, &|| true).unwrap();
            assert_eq!(
                tokenizer.encode_ids(&ids, Truncation::Refuse),
                Ok(row.clone()),
                "{text}"
            );
            // With special tokens around them, as many tokenizers return ids.
            assert_eq!(
                tokenizer.encode_ids(&row.ids, Truncation::Refuse),
                Ok(row),
                "{text}"
            );
        }
        let unknown = tokenizer.encode_ids(&[5, 40], Truncation::Refuse);
        assert_eq!(unknown, Err(EngineError::UnknownTokenId { id: 40 }));
    }
    let short = Tokenizer {
        tokens_max: 4,
        ..bert()
    };
    let refused = short.encode_ids(&[5, 6, 5], Truncation::Refuse);
    assert!(matches!(
        refused,
        Err(EngineError::TooManyTokens { tokens: 5, .. })
    ));
    let truncated = short
        .encode_ids(&[2, 5, 6, 5, 3], Truncation::Right)
        .unwrap();
    assert_eq!(truncated.ids, [2, 5, 6, 3]);
    let truncated = short.encode_ids(&[5, 6, 5], Truncation::Left).unwrap();
    assert_eq!(truncated.ids, [2, 6, 5, 3]);
}

/// The processor time of this thread.
fn processor_time() -> Duration {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    let nanoseconds = stat.split(' ').next().unwrap().parse().unwrap();
    Duration::from_nanos(nanoseconds)
}

/// The least processor time of several tries.
fn least(work: impl Fn()) -> Duration {
    let time = || {
        let before = processor_time();
        work();
        processor_time() - before
    };
    (0..5).map(|_| time()).min().unwrap()
}

#[test]
fn a_text_of_twice_the_length_takes_twice_the_time() {
    let texts: [(&str, usize); 8] = [
        ("[MASK]", 1 << 16),
        (" <mask>", 1 << 16),
        ("<right> ", 1 << 16),
        ("[", 1 << 16),
        ("a", 1 << 16),
        ("a\u{301}", 1 << 16),
        ("\u{301}\u{323}", 1 << 16),
        (" ", 1 << 16),
    ];
    for (name, tokenizer) in [("bert", bert()), ("roberta", roberta())] {
        for (piece, bytes) in texts {
            let once = piece.repeat(bytes / piece.len());
            let twice = once.repeat(2);
            for tokens in [false, true] {
                let work = |text: &str| {
                    if tokens {
                        drop(tokenizer.tokens(text, true, &|| true));
                    } else {
                        drop(tokenizer.ids(text, &|| true));
                    }
                };
                let (one, two) = (least(|| work(&once)), least(|| work(&twice)));
                // Times of a few ticks say nothing.
                let bound = one.mul_f64(2.5) + Duration::from_millis(50);
                println!("{name} {piece:?} tokens {tokens}: {one:?}, {two:?}");
                assert!(two <= bound, "{name} {piece:?}: {one:?}, then {two:?}");
            }
        }
    }
}
