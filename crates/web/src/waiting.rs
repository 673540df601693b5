//! Whether the caller of a body still waits while its JSON is read. Serde gives a
//! visitor nothing beside its text, so that the thread that parses knows the
//! caller.

use std::cell::RefCell;

use platform::pool::Cancelled;
use serde::de;

/// Entries of a list that are read between two looks at the caller.
const ENTRIES_AT_ONCE: usize = 1024;

thread_local! {
    /// The caller of the body that this thread parses.
    static CALLER: RefCell<Option<Cancelled>> = const { RefCell::new(None) };
}

/// Forgets the caller, also when parsing unwinds.
struct Forget;

impl Drop for Forget {
    fn drop(&mut self) {
        CALLER.set(None);
    }
}

/// Parses a body; its lists end early when its caller has left.
pub fn while_waiting<T>(cancelled: &Cancelled, parse: impl FnOnce() -> T) -> T {
    CALLER.set(Some(cancelled.clone()));
    let _forget = Forget;
    parse()
}

/// Looks at the caller before the first entry of a list, and from time to time
/// after that: an error if it has left.
pub fn check<E: de::Error>(entries: usize) -> Result<(), E> {
    if !entries.is_multiple_of(ENTRIES_AT_ONCE) {
        return Ok(());
    }
    let left = CALLER.with_borrow(|caller| caller.as_ref().is_some_and(Cancelled::is_set));
    if left {
        return Err(E::custom("is not read: the caller has left"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use platform::metrics::Metrics;
    use platform::pool::WorkPool;
    use serde::Deserialize;
    use tokio::sync::oneshot;

    use super::super::body;
    use super::*;

    #[derive(Debug, Deserialize)]
    struct Listed {
        #[serde(deserialize_with = "body::texts")]
        texts: Vec<String>,
    }

    fn read() -> Result<usize, String> {
        let listed = body::json::<Listed>(br#"{"texts": ["a", "b"]}"#);
        let listed = listed.map_err(|error| error.to_string())?;
        Ok(listed.texts.len())
    }

    #[tokio::test]
    async fn a_body_is_read_as_long_as_its_caller_waits() {
        let pool = WorkPool::start(1, 10, &Metrics::default()).unwrap();
        let waits = pool.run(1, |cancelled| while_waiting(cancelled, read));
        assert_eq!(waits.await.unwrap(), Ok(2));
        let (begun, begins) = oneshot::channel();
        let (sender, ended) = mpsc::channel();
        let leaves = pool.run(1, move |cancelled| {
            begun.send(()).unwrap();
            while !cancelled.is_set() {
                std::thread::yield_now();
            }
            sender.send(while_waiting(cancelled, read)).unwrap();
        });
        tokio::select! {
            ended = leaves => panic!("it ended: {ended:?}"),
            begun = begins => begun.unwrap(),
        }
        let error = ended.recv().unwrap().unwrap_err();
        assert!(error.contains("the caller has left"), "{error}");
        // The next body of the thread is another caller's.
        assert_eq!(pool.run(1, |_| read()).await.unwrap(), Ok(2));
    }
}
