//! Printing to standard output.

use std::io::{self, Write};

use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

/// Writes text. A reader that closes early, such as `head`, is not an error.
pub fn out(text: &str) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    match stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
    {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

/// Writes a value as JSON on lines of its own.
pub fn json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    let mut text = serde_json::to_string_pretty(value)?;
    text.push('\n');
    out(&text)
}

/// Writes a value as one line of JSON: tensors are long.
pub fn json_line(value: &impl serde::Serialize) -> anyhow::Result<()> {
    let mut text = serde_json::to_string(value)?;
    text.push('\n');
    out(&text)
}

/// Formats rows as columns under a heading, two spaces apart.
pub fn table(heading: &[&str], rows: &[Vec<String>]) -> String {
    let heading: Vec<String> = heading.iter().map(|cell| (*cell).to_owned()).collect();
    let mut widths = vec![0; heading.len()];
    for row in std::iter::once(&heading).chain(rows) {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(visible(cell).width());
        }
    }
    let mut text = String::new();
    for row in std::iter::once(&heading).chain(rows) {
        let mut line = String::new();
        for (width, cell) in widths.iter().zip(row) {
            let cell = visible(cell);
            let padding = width.saturating_sub(cell.width()) + 2;
            line.push_str(&cell);
            line.extend(std::iter::repeat_n(' ', padding));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// The text without control characters, so that strings of a server or a model
/// cannot control the terminal.
pub fn visible(text: &str) -> String {
    text.chars()
        .map(|character| {
            if character.is_control() {
                '·'
            } else {
                character
            }
        })
        .collect()
}

/// The text, shortened to this many columns of the terminal.
pub fn short(text: &str, columns: usize) -> String {
    if text.width() <= columns {
        return text.to_owned();
    }
    let mut width = 1;
    let mut cut: String = text
        .chars()
        .take_while(|character| {
            width += character.width().unwrap_or(0);
            width <= columns
        })
        .collect();
    cut.push('…');
    cut
}

/// A shape in the usual notation, for example `[-1,384]`.
pub fn shape(dimensions: &[i64]) -> String {
    let dimensions: Vec<String> = dimensions.iter().map(i64::to_string).collect();
    format!("[{}]", dimensions.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_stand_under_each_other() {
        let rows = [
            vec!["日本".to_owned(), "1".to_owned()],
            vec!["ab\u{1b}[2J".to_owned(), "2".to_owned()],
        ];
        let text = table(&["name", "n"], &rows);
        assert_eq!(text, "name    n\n日本    1\nab·[2J  2\n");
    }

    #[test]
    fn long_texts_are_shortened() {
        assert_eq!(short("lantern", 7), "lantern");
        assert_eq!(short("lanterns", 7), "lanter…");
        assert_eq!(short("日本語", 5), "日本…");
    }
}
