//! Messages and bodies that look random, are the same for the same seed, and go
//! to extremes where a reader may be weak: many small fields, long words, deep
//! nesting, numbers at their ends, and all of it in gzip.

use serde_json::{Map, Value, json};

use crate::raw;

/// Names that requests of the HTTP door have.
const NAMES: [&str; 30] = [
    "inputs",
    "outputs",
    "parameters",
    "name",
    "datatype",
    "shape",
    "data",
    "id",
    "model",
    "input",
    "query",
    "documents",
    "texts",
    "text",
    "messages",
    "role",
    "content",
    "stop",
    "stream",
    "max_tokens",
    "dimensions",
    "encoding_format",
    "truncate",
    "text_input",
    "ready",
    "repository_name",
    "raw_scores",
    "top_n",
    "tools",
    "binary_data_size",
];
/// Words that requests have.
const WORDS: [&str; 12] = [
    "digits",
    "minilm",
    "pixels",
    "text",
    "FP32",
    "BYTES",
    "INT64",
    "user",
    "float",
    "a lantern",
    "[MASK]",
    "\u{65e5}\u{672c}",
];

/// Numbers that look random (xorshift64) and what is made of them.
#[derive(Debug)]
pub struct Generator(u64);

impl Generator {
    /// A generator of one seed, which is not zero.
    pub fn new(seed: u64) -> Self {
        Self(seed.max(1))
    }

    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A number below `end`.
    pub fn below(&mut self, end: usize) -> usize {
        (self.number() % end.max(1) as u64) as usize
    }

    /// One of several.
    pub fn one<'o, T>(&mut self, of: &'o [T]) -> &'o T {
        &of[self.below(of.len())]
    }

    /// A length up to `most`, of any order of magnitude.
    fn length(&mut self, most: usize) -> usize {
        let bits = self.below(usize::BITS as usize - most.leading_zeros() as usize + 1);
        self.below((1 << bits).min(most) + 1)
    }

    fn integer(&mut self) -> i64 {
        match self.below(6) {
            0 => i64::MAX,
            1 => i64::MIN,
            2 => -1,
            3 => self.number() as i64,
            _ => self.below(300) as i64,
        }
    }

    fn word(&mut self, most: usize) -> String {
        let word = *self.one(&WORDS);
        let repeats = match self.below(8) {
            0 => self.length(most) / word.len(),
            _ => 1,
        };
        word.repeat(repeats)
    }

    /// An encoded message of at most `most` bytes: fields of every wire type with
    /// numbers that methods use, one of them often many times.
    pub fn message(&mut self, most: usize, depth: usize) -> Vec<u8> {
        let mut message = Vec::new();
        let fields = 1 + self.below(12);
        for _ in 0..fields {
            let field = self.field(most.saturating_sub(message.len()), depth);
            let repeats = match self.below(4) {
                0 => self.length(most) / field.len().max(1),
                _ => 1,
            };
            for _ in 0..repeats {
                if message.len() + field.len() > most {
                    return message;
                }
                message.extend_from_slice(&field);
            }
        }
        if self.below(10) == 0 && !message.is_empty() {
            let at = self.below(message.len());
            message[at] ^= 1 << self.below(8);
        }
        message
    }

    fn field(&mut self, most: usize, depth: usize) -> Vec<u8> {
        let mut field = Vec::new();
        let number = 1 + self.below(9) as u64;
        let kind = [0, 1, 2, 2, 2, 2, 2, 5, 3][self.below(9)];
        varint(number << 3 | kind, &mut field);
        match kind {
            0 => varint(self.integer() as u64, &mut field),
            1 => field.extend(self.number().to_le_bytes()),
            5 => field.extend((self.number() as u32).to_le_bytes()),
            2 => {
                let content = match self.below(5) {
                    0 if depth > 0 => self.message(most / 2, depth - 1),
                    1 if depth > 0 => self.message(200.min(most), depth - 1),
                    2 => {
                        let numbers = self.length(most / 4);
                        vec![1; numbers]
                    }
                    3 => Vec::new(),
                    _ => self.word(most / 2).into_bytes(),
                };
                varint(content.len() as u64, &mut field);
                field.extend(content);
            }
            // A group that may have no end.
            _ => {
                if self.below(2) == 0 {
                    varint(number << 3 | 4, &mut field);
                }
            }
        }
        field
    }

    /// A body of JSON of about `most` bytes or fewer, which may be broken.
    pub fn body(&mut self, most: usize) -> Vec<u8> {
        let mut left = most / 2;
        let mut body = self.object(&mut left, 4).to_string().into_bytes();
        match self.below(12) {
            0 => body.truncate(self.below(body.len())),
            1 => {
                let at = self.below(body.len());
                body[at] = *self.one(b"[]{}\",:0-e.");
            }
            2 => body = "[".repeat(self.length(most)).into_bytes(),
            _ => {}
        }
        body.truncate(most);
        body
    }

    fn object(&mut self, left: &mut usize, depth: usize) -> Value {
        let mut object = Map::new();
        for _ in 0..1 + self.below(6) {
            let name = (*self.one(&NAMES)).to_owned();
            object.insert(name, self.value(left, depth));
        }
        if self.below(10) == 0 {
            for number in 0..self.length(*left / 12) {
                object.insert(format!("p{number}"), json!(1));
                *left = left.saturating_sub(12);
            }
        }
        object.into()
    }

    fn value(&mut self, left: &mut usize, depth: usize) -> Value {
        if *left == 0 {
            return Value::Null;
        }
        *left = left.saturating_sub(8);
        match self.below(9) {
            0 => json!(self.integer()),
            1 => json!(f64::from_bits(self.number())),
            2 => Value::Null,
            3 => json!(self.below(2) == 0),
            4 | 5 if depth > 0 => self.object(left, depth - 1),
            6 | 7 if depth > 0 => {
                let entry = self.value(left, depth - 1);
                let bytes = entry.to_string().len() + 1;
                let count = self.length(*left / bytes.max(1));
                *left = left.saturating_sub(count * bytes);
                vec![entry; count].into()
            }
            _ => {
                let word = self.word(*left);
                *left = left.saturating_sub(word.len());
                json!(word)
            }
        }
    }

    /// Sometimes the bytes in gzip, of many times their length where they repeat;
    /// and whether they are.
    pub fn packed(&mut self, bytes: Vec<u8>) -> (Vec<u8>, bool) {
        if self.below(4) > 0 {
            return (bytes, false);
        }
        match raw::gzip(&bytes) {
            Ok(packed) => (packed, true),
            Err(_) => (bytes, false),
        }
    }
}

fn varint(mut number: u64, bytes: &mut Vec<u8>) {
    while number > 0x7f {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_makes_the_same_each_time_and_no_more_than_asked() {
        for seed in 1..200 {
            let (mut one, mut other) = (Generator::new(seed), Generator::new(seed));
            let message = one.message(1000, 3);
            assert_eq!(message, other.message(1000, 3));
            assert!(message.len() <= 1000);
            let body = one.body(1000);
            assert_eq!(body, other.body(1000));
            assert!(body.len() <= 1000);
        }
    }
}
