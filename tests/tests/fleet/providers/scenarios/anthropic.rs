//! What services of Anthropic's API answer, and proxies in its format.

use super::{Scenario, Script, answered, failed_after, fell_back};

const BEGIN: &str =
    r#"{"type":"message_start","message":{"usage":{"input_tokens":3,"output_tokens":1}}}"#;
const UNCOUNTED: &str = r#"{"type":"message_start","message":{"usage":null}}"#;
const BLOCK: &str =
    r#"{"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}"#;
const FULL_BLOCK: &str =
    r#"{"type":"content_block_start","index":0,"content_block":{"type":"text","text":"Good "}}"#;
const GOOD: &str =
    r#"{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"Good "}}"#;
const DAY: &str =
    r#"{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"day"}}"#;
const THOUGHT: &str =
    r#"{"type":"content_block_delta","index":0,"delta":{"type":"thinking_delta","thinking":"no"}}"#;
const PING: &str = r#"{"type":"ping"}"#;
const BLOCK_END: &str = r#"{"type":"content_block_stop","index":0}"#;
const END: &str =
    r#"{"type":"message_delta","delta":{"stop_reason":"end_turn"},"usage":{"output_tokens":2}}"#;
const UNCOUNTED_END: &str =
    r#"{"type":"message_delta","delta":{"stop_reason":"end_turn"},"usage":null}"#;
const STOP: &str = r#"{"type":"message_stop"}"#;
const ERROR: &str = r#"{"type":"error","error":{"type":"overloaded_error","message":"no"}}"#;

/// Streams that are good, and what they cost.
const STREAMS: [(&str, &[&str], f64); 11] = [
    (
        "plain",
        &[BEGIN, BLOCK, PING, GOOD, DAY, BLOCK_END, END, STOP],
        7.0,
    ),
    (
        "text in the begin of a block",
        &[BEGIN, FULL_BLOCK, DAY, BLOCK_END, END, STOP],
        7.0,
    ),
    (
        "thoughts",
        &[BEGIN, BLOCK, THOUGHT, GOOD, DAY, END, STOP],
        7.0,
    ),
    (
        "no begin",
        &[
            GOOD,
            DAY,
            r#"{"type":"message_delta","delta":{"stop_reason":"end_turn"},"usage":{"input_tokens":3,"output_tokens":2}}"#,
            STOP,
        ],
        7.0,
    ),
    (
        "no usage",
        &[UNCOUNTED, GOOD, DAY, UNCOUNTED_END, STOP],
        6.0,
    ),
    (
        "usage of floats",
        &[
            r#"{"type":"message_start","message":{"usage":{"input_tokens":3.0}}}"#,
            GOOD,
            DAY,
            END,
            STOP,
        ],
        7.0,
    ),
    (
        "usage of zero",
        &[
            r#"{"type":"message_start","message":{"usage":{"input_tokens":0}}}"#,
            GOOD,
            DAY,
            r#"{"type":"message_delta","delta":{"stop_reason":"end_turn"},"usage":{"output_tokens":0}}"#,
            STOP,
        ],
        0.0,
    ),
    (
        "a cache",
        &[
            r#"{"type":"message_start","message":{"usage":{"input_tokens":1,"cache_read_input_tokens":2}}}"#,
            GOOD,
            DAY,
            END,
            STOP,
        ],
        7.0,
    ),
    ("no mark of the end", &[BEGIN, GOOD, DAY, END], 7.0),
    (
        "OpenAI's mark of the end",
        &[BEGIN, GOOD, DAY, END, "[DONE]"],
        7.0,
    ),
    (
        "later events",
        &[BEGIN, r#"{"type":"news","index":0}"#, GOOD, DAY, END, STOP],
        7.0,
    ),
];

/// What fails a stream, alone or after a text.
const FAILURES: [(&str, &[&str]); 5] = [
    ("an error", &[ERROR]),
    ("an end", &[]),
    ("a mark of the end", &[STOP]),
    ("OpenAI's mark of the end", &["[DONE]"]),
    (
        "an error as a reason",
        &[r#"{"type":"message_delta","delta":{"stop_reason":"error"}}"#],
    ),
];

/// Messages, and what the caller gets of them.
const MESSAGES: [(&str, &str, &str, &str, f64); 6] = [
    (
        "plain",
        r#"{"content":[{"type":"text","text":"Good day"}],"stop_reason":"end_turn","usage":{"input_tokens":3,"output_tokens":2}}"#,
        "Good day",
        "stop",
        7.0,
    ),
    (
        "two blocks",
        r#"{"content":[{"type":"text","text":"Good "},{"type":"thinking","thinking":"no"},{"type":"text","text":"day"}],"stop_reason":"max_tokens","usage":{"input_tokens":3,"output_tokens":2}}"#,
        "Good day",
        "length",
        7.0,
    ),
    (
        "no usage",
        r#"{"content":[{"type":"text","text":"Good day"}],"stop_reason":"end_turn","usage":null}"#,
        "Good day",
        "stop",
        6.0,
    ),
    (
        "usage of zero",
        r#"{"content":[{"type":"text","text":"Good day"}],"stop_reason":"end_turn","usage":{"input_tokens":0,"output_tokens":0}}"#,
        "Good day",
        "stop",
        0.0,
    ),
    (
        "a call of a tool",
        r#"{"content":[{"type":"tool_use","id":"1","name":"f","input":{}}],"stop_reason":"tool_use","usage":{"input_tokens":3,"output_tokens":2}}"#,
        "",
        "tool_calls",
        7.0,
    ),
    (
        "a refusal",
        r#"{"content":[],"stop_reason":"refusal","usage":{"input_tokens":3,"output_tokens":2}}"#,
        "",
        "content_filter",
        7.0,
    ),
];

/// The events by their names, as this API writes them.
fn framed(events: &[&str]) -> String {
    let events = events.iter().map(|data| {
        let name = data.split('"').nth(3).unwrap_or("message");
        format!("event: {name}\ndata: {data}\n\n")
    });
    events.collect()
}

/// Every scenario of this API.
pub(super) fn scenarios() -> Vec<Scenario> {
    let mut all = Vec::new();
    let mut add = |name: &str, stream, script, expected| {
        all.push(Scenario {
            name: name.to_owned(),
            kind: "anthropic",
            stream,
            script,
            expected,
        });
    };
    for (name, events, cost) in STREAMS {
        let expected = answered("Good day", "stop", cost);
        let events = framed(events);
        add(name, true, Script::events(&events), expected.clone());
        let mut cut = Script::events(events.replace('\n', "\r\n"));
        cut.byte_by_byte = true;
        add(&format!("{name}, byte by byte"), true, cut, expected);
    }
    for (name, events) in FAILURES {
        let failure = framed(events);
        // The begin of the message says what was read, and that is charged.
        let alone = fell_back("UNAVAILABLE", 0.0);
        add(name, true, Script::events(&failure), alone);
        let begun = Script::events(framed(&[UNCOUNTED, BLOCK]) + &failure);
        let name = format!("a failure: {name}");
        add(&name, true, begun, fell_back("UNAVAILABLE", 0.0));
        let counted = Script::events(framed(&[BEGIN, BLOCK]) + &failure);
        add(
            &format!("{name}, counted"),
            true,
            counted,
            fell_back("UNAVAILABLE", 5.0),
        );
        let after = Script::events(framed(&[BEGIN, BLOCK, GOOD]) + &failure);
        add(
            &format!("{name}, after a text"),
            true,
            after,
            failed_after("Good ", 7.0),
        );
    }
    for (name, body, text, end, cost) in MESSAGES {
        let expected = answered(text, end, cost);
        add(name, false, Script::json(body), expected.clone());
        add(name, true, Script::json(body), expected);
    }
    let error = fell_back("UNAVAILABLE", 0.0);
    add("an error of 200", false, Script::json(ERROR), error.clone());
    add("an error of 200", true, Script::json(ERROR), error);
    all
}
