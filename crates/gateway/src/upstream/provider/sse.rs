//! Server-sent events as providers write them.

/// Bytes of one event, and of one line.
const EVENT_BYTES_MAX: usize = 1 << 20;

/// One event.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Event {
    /// Its type; empty where it has none.
    pub name: String,
    /// Its data, lines joined.
    pub data: String,
}

/// Events that are put together from chunks.
#[derive(Debug, Default)]
pub struct Events {
    line: Vec<u8>,
    next: Event,
    /// Whether the event has data, be it empty.
    begun: bool,
}

impl Events {
    /// Takes what came next and returns the events that it completes.
    pub fn take(&mut self, chunk: &[u8]) -> Result<Vec<Event>, &'static str> {
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
        match self.line.len() + self.next.data.len() + self.next.name.len() {
            bytes if bytes > EVENT_BYTES_MAX => Err("an event is too long"),
            _ => Ok(()),
        }
    }

    fn take_line(&mut self, line: &str) -> Option<Event> {
        if line.is_empty() {
            let event = std::mem::take(&mut self.next);
            return std::mem::take(&mut self.begun).then_some(event);
        }
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "event" => value.clone_into(&mut self.next.name),
            "data" => {
                if self.begun {
                    self.next.data.push('\n');
                }
                self.begun = true;
                self.next.data.push_str(value);
            }
            // Comments keep the connection alive; ids are for coming back.
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
        let events = Events::default().take(text.as_bytes()).unwrap();
        let pairs: Vec<_> = events
            .iter()
            .map(|e| (e.name.as_str(), e.data.as_str()))
            .collect();
        assert_eq!(
            pairs,
            [("delta", "{\"a\":1}"), ("", "one\ntwo"), ("", "[DONE]")]
        );
        let long = vec![b'a'; EVENT_BYTES_MAX + 1];
        assert!(Events::default().take(&long).is_err());
    }

    proptest! {
        #[test]
        fn it_does_not_matter_how_events_are_cut(
            bytes in proptest::collection::vec(proptest::sample::select(b"data: e\n\r:x".to_vec()), 0..200),
            cut in 0usize..200,
        ) {
            let whole = Events::default().take(&bytes).unwrap();
            let (first, second) = bytes.split_at(cut.min(bytes.len()));
            let mut events = Events::default();
            let mut parts = events.take(first).unwrap();
            parts.extend(events.take(second).unwrap());
            prop_assert_eq!(whole, parts);
        }

        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = Events::default().take(&bytes);
        }
    }
}
