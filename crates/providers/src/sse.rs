//! Server-sent events, as services write them.

/// Bytes of one event, a line that is not complete included.
const EVENT_BYTES_MAX: usize = 1 << 20;

/// One event.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Event {
    /// Its type; empty where it has none.
    pub name: String,
    /// Its data, lines joined.
    pub data: String,
}

/// Puts events together from chunks.
#[derive(Debug, Default)]
pub struct EventParser {
    line: Vec<u8>,
    next: Event,
    /// Whether the event has data, even if it is empty.
    has_data: bool,
}

impl EventParser {
    /// Takes the chunk that came next and returns the events that it completes.
    pub fn push(&mut self, chunk: &[u8]) -> Result<Vec<Event>, &'static str> {
        let mut events = Vec::new();
        let mut rest = chunk;
        while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
            self.line.extend_from_slice(&rest[..end]);
            rest = &rest[end + 1..];
            let line = std::mem::take(&mut self.line);
            let line = line.strip_suffix(b"\r").unwrap_or(&line);
            let line = std::str::from_utf8(line).map_err(|_| "an event is not UTF-8")?;
            events.extend(self.take_line(line));
            self.check()?;
        }
        self.line.extend_from_slice(rest);
        self.check()?;
        Ok(events)
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

    #[test]
    fn events_have_names_and_lines() {
        let text = ": hello\n\nevent: delta\r\ndata: {\"a\":1}\r\n\r\ndata:one\ndata: two\nid: 3\n\ndata: [DONE]\n\nrest";
        let events = EventParser::default().push(text.as_bytes()).unwrap();
        let pairs: Vec<_> = events
            .iter()
            .map(|e| (e.name.as_str(), e.data.as_str()))
            .collect();
        assert_eq!(
            pairs,
            [("delta", "{\"a\":1}"), ("", "one\ntwo"), ("", "[DONE]")]
        );
        let long = vec![b'a'; EVENT_BYTES_MAX + 1];
        assert!(EventParser::default().push(&long).is_err());
    }

    proptest! {
        #[test]
        fn it_does_not_matter_how_events_are_cut(
            bytes in proptest::collection::vec(proptest::sample::select(b"data: e\n\r:x".to_vec()), 0..200),
            cut in 0usize..200,
        ) {
            let whole = EventParser::default().push(&bytes).unwrap();
            let (first, second) = bytes.split_at(cut.min(bytes.len()));
            let mut events = EventParser::default();
            let mut parts = events.push(first).unwrap();
            parts.extend(events.push(second).unwrap());
            prop_assert_eq!(whole, parts);
        }

        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = EventParser::default().push(&bytes);
        }
    }
}
