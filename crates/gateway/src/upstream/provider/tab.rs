//! What a call takes of a service, noted as it goes: a caller may leave before
//! there is an answer, and the service takes its money all the same.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::time::Instant;

use super::Provider;
use super::catalogue::Used;
use super::client::Outgoing;
use super::trouble::Trouble;

/// What one call can take: services may say anything.
const AMOUNT_MAX: u64 = 1 << 40;

/// What one call has taken so far.
#[derive(Debug, Default)]
pub struct Tab(Mutex<Noted>);

#[derive(Debug, Default)]
struct Noted {
    /// What services said.
    said: Used,
    /// What is under way, by a guess.
    guessed: Used,
}

/// What a call is held to.
#[derive(Debug, Clone, Copy)]
pub struct Terms<'a> {
    /// When the caller stops waiting.
    pub deadline: Instant,
    /// Where it is noted what the call takes.
    pub tab: &'a Tab,
}

impl Used {
    /// Both together.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            input_tokens: self.input_tokens.saturating_add(other.input_tokens),
            output_tokens: self.output_tokens.saturating_add(other.output_tokens),
            searches: self.searches.saturating_add(other.searches),
            requests: self.requests.saturating_add(other.requests),
        }
    }

    /// No more than one call can take.
    #[must_use]
    pub fn bounded(self) -> Self {
        Self {
            input_tokens: self.input_tokens.min(AMOUNT_MAX),
            output_tokens: self.output_tokens.min(AMOUNT_MAX),
            searches: self.searches.min(AMOUNT_MAX),
            requests: self.requests.min(AMOUNT_MAX),
        }
    }

    /// Tokens of both kinds.
    pub fn tokens(self) -> u64 {
        self.input_tokens.saturating_add(self.output_tokens)
    }
}

impl Tab {
    /// What the call has taken, with a guess at what is not known.
    pub fn sum(&self) -> Used {
        let noted = self.lock();
        noted.said.plus(noted.guessed)
    }

    /// Something is being sent that takes about so much.
    pub(super) fn sending(&self, guess: Used) {
        self.lock().guessed = guess;
    }

    /// It took so much.
    pub(super) fn took(&self, used: Used) {
        let mut noted = self.lock();
        noted.said = noted.said.plus(used);
        noted.guessed = Used::default();
    }

    /// It did not succeed.
    pub(super) fn failed(&self, trouble: &Trouble) {
        if !trouble.may_cost() {
            self.lock().guessed = Used::default();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Noted> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Provider {
    /// The same terms with the model's own time, and early enough to say whose
    /// fault it is that there is no answer.
    pub(super) fn held_to<'t>(&self, terms: Terms<'t>) -> Terms<'t> {
        Terms {
            deadline: self.ends(terms.deadline),
            tab: terms.tab,
        }
    }

    /// Exchanges a call that takes about so much, by a moment. What an answer
    /// took is for who reads it to note.
    pub(super) async fn paying<T: Send + 'static>(
        self: &Arc<Self>,
        outgoing: &Outgoing,
        terms: Terms<'_>,
        guess: Used,
        read: impl Fn(&[u8]) -> Result<T, &'static str> + Clone + Send + 'static,
    ) -> Result<T, Trouble> {
        terms.tab.sending(guess);
        let answered = self.exchange(outgoing, terms.deadline, read).await;
        answered.inspect_err(|trouble| terms.tab.failed(trouble))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guess_stands_until_it_is_known() {
        let calls = |requests| Used {
            requests,
            ..Used::default()
        };
        let tab = Tab::default();
        tab.sending(calls(1));
        assert_eq!(tab.sum(), calls(1));
        tab.took(calls(3));
        assert_eq!(tab.sum(), calls(3));
        tab.sending(calls(1));
        tab.failed(&Trouble::NotSent);
        assert_eq!(tab.sum(), calls(3));
        tab.sending(calls(u64::MAX));
        tab.failed(&Trouble::Late);
        assert_eq!(tab.sum(), calls(u64::MAX));
    }
}
