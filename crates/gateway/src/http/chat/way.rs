//! A conversation's way down the stack.

use http::{HeaderMap, HeaderName, HeaderValue};
use protocol::{Error, FALLBACK_KEY};
use providers::{ChatRequest, ChatResponse, ChatStream};

use super::super::gate::Visit;
use crate::request::ModelSelector;
use crate::stack::{Chat, ChatStreaming};

/// A whole answer, and what the caller is told besides.
pub async fn chat(
    visit: &Visit,
    wanted: &ModelSelector,
    chat: &ChatRequest,
) -> Result<(HeaderMap, ChatResponse), Error> {
    let plan = visit.stack.route(wanted, &visit.caller)?;
    let chat = Chat {
        caller: &visit.caller,
        request: chat,
        deadline: visit.deadline,
    };
    let generated = visit.stack.run(&plan, &chat).await;
    let generated = generated.map_err(|status| Error::from_status(&status))?;
    visit.answered_by(&generated.model);
    Ok((told(generated.fallback), generated.content))
}

/// An answer in parts, and what the caller is told besides.
pub async fn chat_stream(
    visit: &Visit,
    wanted: &ModelSelector,
    chat: &ChatRequest,
) -> Result<(HeaderMap, ChatStream), Error> {
    let plan = visit.stack.route(wanted, &visit.caller)?;
    let chat = ChatStreaming(Chat {
        caller: &visit.caller,
        request: chat,
        deadline: visit.ends,
    });
    let generated = visit.stack.run(&plan, &chat).await;
    let generated = generated.map_err(|status| Error::from_status(&status))?;
    visit.answered_by(&generated.model);
    Ok((told(generated.fallback), generated.content))
}

fn told(fallback: Option<HeaderValue>) -> HeaderMap {
    let entry = fallback.map(|value| (HeaderName::from_static(FALLBACK_KEY), value));
    entry.into_iter().collect()
}
