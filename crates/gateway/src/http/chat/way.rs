//! A conversation's way down the stack.

use http::{HeaderMap, HeaderName, HeaderValue};
use protocol::{Error, FALLBACK_KEY};

use super::super::gate::Visit;
use crate::service::Wanted;
use crate::stack::Conversation;
use crate::upstream::provider::{ChatAnswer, ChatRequest, ChatStream};

/// A whole answer, and what the caller is told besides.
pub async fn chat(
    visit: &Visit,
    wanted: &Wanted,
    chat: &ChatRequest,
) -> Result<(HeaderMap, ChatAnswer), Error> {
    let said = visit.stack.chat(Conversation {
        wanted,
        caller: &visit.caller,
        chat,
        deadline: visit.deadline,
    });
    let said = said.await;
    let said = said.map_err(|status| Error::from_status(&status))?;
    visit.answered_by(&said.model);
    Ok((told(said.fallback), said.answer))
}

/// An answer in parts, and what the caller is told besides.
pub async fn chat_stream(
    visit: &Visit,
    wanted: &Wanted,
    chat: &ChatRequest,
) -> Result<(HeaderMap, ChatStream), Error> {
    let said = visit.stack.chat_stream(Conversation {
        wanted,
        caller: &visit.caller,
        chat,
        deadline: visit.ends,
    });
    let said = said.await;
    let said = said.map_err(|status| Error::from_status(&status))?;
    visit.answered_by(&said.model);
    Ok((told(said.fallback), said.answer))
}

fn told(fallback: Option<HeaderValue>) -> HeaderMap {
    let entry = fallback.map(|value| (HeaderName::from_static(FALLBACK_KEY), value));
    entry.into_iter().collect()
}
