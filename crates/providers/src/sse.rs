//! Server-sent events, as services write them.

/// Bytes of one event, a line that is not complete included.
const EVENT_BYTES_MAX: usize = 1 << 20;
/// U+FEFF in UTF-8.
const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();

/// One event.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Event {
    /// Its type; empty where it has none.
    pub name: String,
    /// Its data, lines joined.
    pub data: String,
}

/// Puts events together from chunks. Lines end with LF, CR or both, and the
/// first may begin with a byte order mark.
#[derive(Debug, Default)]
pub struct EventParser {
    line: Vec<u8>,
    next: Event,
    /// Whether the event has data, even if it is empty.
    has_data: bool,
    /// Whether a line has ended: there is no byte order mark after that.
    begun: bool,
    /// Whether the last byte was a CR, whose line a LF would end too.
    after_cr: bool,
}

impl EventParser {
    /// Takes the chunk that came next and adds the events that it completes: in
    /// an error, those before what is wrong.
    pub fn push(&mut self, chunk: &[u8], events: &mut Vec<Event>) -> Result<(), &'static str> {
        let mut rest = chunk;
        if self.after_cr && !rest.is_empty() {
            self.after_cr = false;
            rest = rest.strip_prefix(b"\n").unwrap_or(rest);
        }
        while let Some(end) = rest.iter().position(|byte| matches!(byte, b'\n' | b'\r')) {
            self.line.extend_from_slice(&rest[..end]);
            let cr = rest[end] == b'\r';
            rest = &rest[end + 1..];
            if cr {
                self.after_cr = rest.is_empty();
                rest = rest.strip_prefix(b"\n").unwrap_or(rest);
            }
            events.extend(self.end_line()?);
            self.check()?;
        }
        self.line.extend_from_slice(rest);
        self.check()
    }

    /// The event that the end of the stream completes: some services do not
    /// write the empty line after the last one.
    pub fn finish(&mut self) -> Result<Option<Event>, &'static str> {
        let before = self.end_line()?;
        Ok(before.or_else(|| self.take_line("")))
    }

    fn end_line(&mut self) -> Result<Option<Event>, &'static str> {
        let line = std::mem::take(&mut self.line);
        let line = match std::mem::replace(&mut self.begun, true) {
            true => &line[..],
            false => line.strip_prefix(BYTE_ORDER_MARK).unwrap_or(&line),
        };
        let line = std::str::from_utf8(line).map_err(|_| "an event is not UTF-8")?;
        Ok(self.take_line(line))
    }

    fn check(&self) -> Result<(), &'static str> {
        let bytes = self.line.len() + self.next.data.len() + self.next.name.len();
        if bytes > EVENT_BYTES_MAX {
            return Err("an event is too long");
        }
        Ok(())
    }

    fn take_line(&mut self, line: &str) -> Option<Event> {
        if line.is_empty() {
            let event = std::mem::take(&mut self.next);
            return std::mem::take(&mut self.has_data).then_some(event);
        }
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "event" => value.clone_into(&mut self.next.name),
            "data" => {
                if self.has_data {
                    self.next.data.push('\n');
                }
                self.has_data = true;
                self.next.data.push_str(value);
            }
            // Comments keep the connection alive; ids are for reconnecting.
            _ => {}
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pushed(parser: &mut EventParser, chunk: &[u8]) -> Result<Vec<Event>, &'static str> {
        let mut events = Vec::new();
        parser.push(chunk, &mut events)?;
        Ok(events)
    }

    fn parsed(text: &[u8]) -> Result<Vec<Event>, &'static str> {
        pushed(&mut EventParser::default(), text)
    }

    #[test]
    fn the_events_before_an_error_are_kept() {
        let mut events = Vec::new();
        let chunk = b"data: a\n\ndata: \xff\n\n";
        let wrong = EventParser::default().push(chunk, &mut events);
        assert!(wrong.is_err());
        assert_eq!(events[0].data, "a");
    }

    #[test]
    fn events_have_names_and_lines() {
        let text = ": hello\n\nevent: delta\r\ndata: {\"a\":1}\r\n\r\ndata:one\ndata: two\nid: 3\n\ndata: [DONE]\n\nrest";
        let events = parsed(text.as_bytes()).unwrap();
        let pairs: Vec<_> = events
            .iter()
            .map(|e| (e.name.as_str(), e.data.as_str()))
            .collect();
        assert_eq!(
            pairs,
            [("delta", "{\"a\":1}"), ("", "one\ntwo"), ("", "[DONE]")]
        );
        let long = vec![b'a'; EVENT_BYTES_MAX + 1];
        assert!(parsed(&long).is_err());
    }

    #[test]
    fn every_end_of_a_line_is_one() {
        let text = "data: one\ndata: two\n\nevent: e\ndata: thr\u{e9}e\n\n";
        let expected = parsed(text.as_bytes()).unwrap();
        assert_eq!(expected.len(), 2);
        for end in ["\n", "\r", "\r\n"] {
            for mark in ["", "\u{feff}"] {
                let text = format!("{mark}{}", text.replace('\n', end));
                // In one piece, and byte by byte: characters are split too.
                assert_eq!(parsed(text.as_bytes()).unwrap(), expected, "{text:?}");
                let mut parser = EventParser::default();
                let bytes = text.as_bytes().chunks(1);
                let events: Vec<_> = bytes
                    .flat_map(|byte| pushed(&mut parser, byte).unwrap())
                    .collect();
                assert_eq!(events, expected, "{text:?}");
            }
        }
    }

    #[test]
    fn the_end_of_the_stream_ends_the_last_event() {
        for (text, last) in [
            ("data: a", Some("a")),
            ("data: a\n", Some("a")),
            ("data: a\r", Some("a")),
            ("\u{feff}data: a", Some("a")),
            ("data: a\n\n", None),
            (": a", None),
            ("", None),
        ] {
            let mut parser = EventParser::default();
            pushed(&mut parser, text.as_bytes()).unwrap();
            let event = parser.finish().unwrap();
            assert_eq!(event.map(|event| event.data).as_deref(), last, "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn it_does_not_matter_how_events_are_cut(
            bytes in proptest::collection::vec(proptest::sample::select(b"data: e\n\r:x".to_vec()), 0..200),
            cut in 0usize..200,
        ) {
            let whole = parsed(&bytes).unwrap();
            let (first, second) = bytes.split_at(cut.min(bytes.len()));
            let mut events = EventParser::default();
            let mut parts = pushed(&mut events, first).unwrap();
            parts.extend(pushed(&mut events, second).unwrap());
            prop_assert_eq!(whole, parts);
        }

        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = parsed(&bytes);
        }
    }
}
