//! What services of OpenAI's API answer.

use super::{Expected, Scenario, Script, answered, failed_after, fell_back, framed, refused};

/// Every scenario of this API.
pub(super) fn scenarios() -> Vec<Scenario> {
    let mut all = usages();
    all.extend(whole());
    all.extend(responses());
    all.extend(formats());
    all.extend(streams());
    all.extend(breaks());
    all
}

fn scenario(name: &str, script: Script, expected: Expected) -> Scenario {
    Scenario {
        name: name.to_owned(),
        kind: "openai",
        stream: false,
        script,
        expected,
    }
}

fn streamed(name: &str, script: Script, expected: Expected) -> Scenario {
    Scenario {
        stream: true,
        ..scenario(name, script, expected)
    }
}

/// Usage however it is written, and its cost: a token that was read costs one,
/// and one that was written two. Where nothing is known there are two of each.
const USAGES: [(&str, &str, f64); 18] = [
    (
        "plain",
        r#"{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}"#,
        7.0,
    ),
    ("null", "null", 6.0),
    ("empty", "{}", 6.0),
    ("a list", "[]", 6.0),
    ("a text", r#""none""#, 6.0),
    ("a flag", "true", 6.0),
    (
        "floats",
        r#"{"prompt_tokens":3.0,"completion_tokens":2.0}"#,
        7.0,
    ),
    (
        "parts of tokens",
        r#"{"prompt_tokens":2.5,"completion_tokens":1.5}"#,
        7.0,
    ),
    (
        "texts",
        r#"{"prompt_tokens":"3.0","completion_tokens":"2"}"#,
        7.0,
    ),
    (
        "zeros",
        r#"{"prompt_tokens":0,"completion_tokens":0,"total_tokens":0}"#,
        0.0,
    ),
    ("a total alone", r#"{"total_tokens":5}"#, 8.0),
    ("a total of zero", r#"{"total_tokens":0}"#, 0.0),
    (
        "a total and nulls",
        r#"{"prompt_tokens":null,"completion_tokens":null,"total_tokens":5}"#,
        8.0,
    ),
    (
        "no completion",
        r#"{"prompt_tokens":3,"total_tokens":5}"#,
        7.0,
    ),
    ("the prompt alone", r#"{"prompt_tokens":3}"#, 7.0),
    ("the completion alone", r#"{"completion_tokens":3}"#, 8.0),
    (
        "negative",
        r#"{"prompt_tokens":-3,"completion_tokens":-2}"#,
        6.0,
    ),
    (
        "other names",
        r#"{"input_tokens":3,"output_tokens":2}"#,
        7.0,
    ),
];

fn usages() -> Vec<Scenario> {
    let mut all = Vec::new();
    for (name, usage, cost) in USAGES {
        let name = format!("usage: {name}");
        let expected = answered("Good day", "stop", cost);
        let choice = r#"{"message":{"content":"Good day"},"finish_reason":"stop"}"#;
        let whole = format!(r#"{{"choices":[{choice}],"usage":{usage}}}"#);
        all.push(scenario(&name, Script::json(whole), expected.clone()));
        let last = format!(r#"{{"choices":[],"usage":{usage}}}"#);
        let events = framed(&[GOOD, DAY, STOP, &last, "[DONE]"]);
        all.push(streamed(&name, Script::events(events), expected));
    }
    all
}

/// The message, the finish reason, and what the caller gets of them.
const MESSAGES: [(&str, &str, &str, &str, &str); 12] = [
    ("no content", r#"{"content":null}"#, r#""stop""#, "", "stop"),
    ("no content at all", "{}", r#""stop""#, "", "stop"),
    (
        "parts",
        r#"{"content":[{"type":"text","text":"Good "},{"type":"text","text":"day"}]}"#,
        r#""stop""#,
        "Good day",
        "stop",
    ),
    (
        "a part that is thought",
        r#"{"content":[{"type":"thinking","thinking":[{"type":"text","text":"no"}]},{"type":"text","text":"Good day"}]}"#,
        r#""stop""#,
        "Good day",
        "stop",
    ),
    (
        "thoughts beside the text",
        r#"{"reasoning_content":"no","content":"Good day"}"#,
        r#""stop""#,
        "Good day",
        "stop",
    ),
    (
        "a limit",
        r#"{"content":"Good day"}"#,
        r#""length""#,
        "Good day",
        "length",
    ),
    (
        "a filter",
        r#"{"content":""}"#,
        r#""content_filter""#,
        "",
        "content_filter",
    ),
    (
        "another reason",
        r#"{"content":"Good day"}"#,
        r#""eos""#,
        "Good day",
        "stop",
    ),
    (
        "no reason",
        r#"{"content":"Good day"}"#,
        "null",
        "Good day",
        "stop",
    ),
    (
        "an empty reason",
        r#"{"content":"Good day"}"#,
        r#""""#,
        "Good day",
        "stop",
    ),
    (
        "a call of a tool",
        r#"{"content":null,"tool_calls":[{"id":"1","type":"function","function":{"name":"f","arguments":"{}"}}]}"#,
        r#""tool_calls""#,
        "",
        "tool_calls",
    ),
    (
        "no calls of tools",
        r#"{"content":"Good day","tool_calls":null,"function_call":null,"refusal":null}"#,
        r#""stop""#,
        "Good day",
        "stop",
    ),
];

/// Bodies of status 200 that are an error, with what the service says to have
/// used.
const ERRORS: [(&str, &str, f64); 11] = [
    ("error", r#"{"error":{"message":"no","code":500}}"#, 0.0),
    ("error as a text", r#"{"error":"no"}"#, 0.0),
    (
        "error with usage",
        r#"{"error":{"message":"no"},"usage":{"prompt_tokens":3,"completion_tokens":1}}"#,
        5.0,
    ),
    (
        "error with a usage of zero",
        r#"{"error":{"message":"no"},"usage":{"prompt_tokens":0,"completion_tokens":0}}"#,
        0.0,
    ),
    (
        "error with a usage of null",
        r#"{"error":{"message":"no"},"usage":null}"#,
        0.0,
    ),
    (
        "error and choices",
        r#"{"error":{"code":1},"choices":[]}"#,
        0.0,
    ),
    (
        "object",
        r#"{"object":"error","message":"no","code":40303}"#,
        0.0,
    ),
    (
        "type",
        r#"{"type":"error","error":{"type":"overloaded_error"}}"#,
        0.0,
    ),
    ("detail", r#"{"detail":"no"}"#, 0.0),
    (
        "in a choice",
        r#"{"choices":[{"error":{"code":502},"message":{"content":""},"finish_reason":"stop"}]}"#,
        0.0,
    ),
    (
        "as a reason",
        r#"{"choices":[{"message":{"content":"Good"},"finish_reason":"error"}]}"#,
        0.0,
    ),
];

/// Bodies of status 200 that are no response.
const RUBBISH: [&str; 8] = [
    "",
    "null",
    "[]",
    "{}",
    r#"{"choices":null}"#,
    r#"{"choices":[]}"#,
    r#"{"choices":[{"finish_reason":"stop"}]}"#,
    r#"{"choices":[{"message":{"content":"Good"#,
];

fn whole() -> Vec<Scenario> {
    let mut all = Vec::new();
    for (name, message, reason, text, end) in MESSAGES {
        let choice = format!(r#"{{"index":0,"message":{message},"finish_reason":{reason}}}"#);
        let usage = r#"{"prompt_tokens":3,"completion_tokens":2}"#;
        let body = format!(r#"{{"choices":[{choice}],"usage":{usage}}}"#);
        let expected = answered(text, end, 7.0);
        all.push(scenario(name, Script::json(&body), expected.clone()));
        // One that has no streams writes it whole to whoever wants one.
        all.push(streamed(name, Script::json(&body), expected));
    }
    for (name, body, cost) in ERRORS {
        let name = format!("an error: {name}");
        let expected = fell_back("UNAVAILABLE", cost);
        all.push(scenario(&name, Script::json(body), expected.clone()));
        all.push(streamed(&name, Script::json(body), expected.clone()));
        let name = format!("{name}, as events");
        all.push(streamed(&name, Script::events(body), expected));
    }
    for body in RUBBISH {
        let name = format!("rubbish: {body}");
        // What it read, and what the body may have been.
        let written = body.len().div_ceil(4).min(7);
        let expected = fell_back("UNAVAILABLE", 2.0 + 2.0 * written as f64);
        all.push(scenario(&name, Script::json(body), expected));
        // What is neither JSON nor an event is no sign of a response.
        let is_json = body.starts_with(['{', '[']);
        let read = fell_back("UNAVAILABLE", if is_json { 2.0 } else { 0.0 });
        all.push(streamed(&name, Script::json(body), read));
    }
    let body = r#"{"choices":[{"message":{"content":"Good day"},"finish_reason":"stop"}],"usage":{"prompt_tokens":3,"completion_tokens":2}}"#;
    let marked = Script::json(format!("\u{feff}{body}"));
    all.push(scenario(
        "a mark",
        marked,
        answered("Good day", "stop", 7.0),
    ));
    let mut cut = Script::json(body);
    cut.byte_by_byte = true;
    all.push(scenario(
        "byte by byte",
        cut,
        answered("Good day", "stop", 7.0),
    ));
    all
}

/// What is no JSON and no stream, to callers of both.
fn responses() -> Vec<Scenario> {
    let html = "<!DOCTYPE html><html><body>Bad gateway</body></html>";
    let page = Script::new("200 OK\r\ncontent-type: text/html; charset=utf-8", html);
    let cut = "200 OK\r\ncontent-length: 1000\r\ncontent-type: ";
    let cut_whole = Script::new(&format!("{cut}application/json"), "{\"choices\":[");
    let cut_stream = Script::new(&format!("{cut}text/event-stream"), ": hello\n\n");
    let nothing = Script {
        bytes: Vec::new(),
        byte_by_byte: false,
        falls_silent: false,
        stays_alive: false,
    };
    let mut silent = Script::json("{");
    silent.falls_silent = true;
    // A service that did not say what it used may have read the request, and
    // written to a caller of a whole response all that it could.
    let (read, most) = (2.0, 16.0);
    let late = |cost| fell_back("DEADLINE_EXCEEDED", cost);
    let lost = |cost| fell_back("UNAVAILABLE", cost);
    let mut all = vec![
        scenario("a page", page.clone(), lost(most)),
        streamed("a page", page, lost(read)),
        scenario("cut", cut_whole, lost(most)),
        streamed("cut", cut_stream, lost(read)),
        scenario("nothing", nothing.clone(), lost(most)),
        streamed("nothing", nothing, lost(read)),
        scenario("silent", silent.clone(), late(most)),
        streamed("silent", silent, late(read)),
    ];
    for (status, expected) in [
        ("500 Oh", lost(0.0)),
        ("503 Oh", lost(0.0)),
        ("429 Oh", lost(0.0)),
        ("401 Oh", lost(0.0)),
        ("404 Oh", lost(0.0)),
        ("302 Oh\r\nlocation: /good/v1/chat/completions", lost(0.0)),
        ("400 Oh", refused(400)),
        ("422 Oh", refused(400)),
    ] {
        let script = Script::new(status, r#"{"error":{"message":"no"}}"#);
        all.push(scenario(status, script.clone(), expected.clone()));
        all.push(streamed(status, script, expected));
    }
    all
}

const ROLE: &str =
    r#"{"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}"#;
const GOOD: &str = r#"{"choices":[{"index":0,"delta":{"content":"Good "}}]}"#;
const DAY: &str = r#"{"choices":[{"index":0,"delta":{"content":"day"}}]}"#;
const STOP: &str = r#"{"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}"#;
const USED: &str = r#"{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}"#;
/// An error in an event.
const ERROR: &str = r#"{"error":{"message":"no","code":500}}"#;

/// The same events in every form that a stream of events may have.
fn formats() -> Vec<Scenario> {
    let plain = framed(&[ROLE, GOOD, DAY, STOP, USED, "[DONE]"]);
    let (head, rest) = plain.split_at(plain.find(GOOD).unwrap_or_default());
    let lines = GOOD.replace(",\"delta\"", "\ndata: ,\"delta\"");
    let forms = [
        ("LF", plain.clone()),
        ("CRLF", plain.replace('\n', "\r\n")),
        ("CR", plain.replace('\n', "\r")),
        ("a mark", format!("\u{feff}{plain}")),
        (
            "a mark and CRLF",
            format!("\u{feff}{}", plain.replace('\n', "\r\n")),
        ),
        ("no space", plain.replace("data: ", "data:")),
        ("comments", plain.replace("data: ", ": hello\n\ndata: ")),
        ("a comment first", format!(": hello\n{plain}")),
        ("names", plain.replace("data: ", "event: message\ndata: ")),
        ("ids", plain.replace("data: ", "id: 7\nretry: 1\ndata: ")),
        (
            "pings",
            plain.replace("data: ", "event: ping\ndata: {}\n\ndata: "),
        ),
        (
            "pings of text",
            plain.replace("data: ", "event: ping\ndata: ping\n\ndata: "),
        ),
        ("no data", plain.replace("data: ", "data:\n\ndata: ")),
        (
            "several lines",
            format!("{head}{}", rest.replace(GOOD, &lines)),
        ),
        ("empty lines", plain.replace("\n\n", "\n\n\n\n")),
        ("no mark of the end", plain.replace("data: [DONE]\n\n", "")),
        ("no line after the end", plain.trim_end().to_owned()),
        (
            "no line after the last",
            framed(&[GOOD, DAY, USED, STOP]).trim_end().to_owned(),
        ),
        ("more after the end", format!("{plain}data: [DONE]\n\n")),
    ];
    let mut all = Vec::new();
    for (name, events) in forms {
        let expected = answered("Good day", "stop", 7.0);
        let mut script = Script::events(&events);
        all.push(streamed(name, script.clone(), expected.clone()));
        script.byte_by_byte = true;
        all.push(streamed(&format!("{name}, byte by byte"), script, expected));
    }
    // Four bytes, each in a chunk of its own.
    let events = plain.replace("day", "\u{1f56f}");
    let mut split = Script::events(events);
    split.byte_by_byte = true;
    all.push(streamed(
        "a split character",
        split,
        answered("Good \u{1f56f}", "stop", 7.0),
    ));
    for head in ["200 OK", "200 OK\r\ncontent-type: application/json"] {
        let expected = answered("Good day", "stop", 7.0);
        all.push(streamed(head, Script::new(head, &plain), expected));
    }
    all
}

/// Streams that are good, and what they cost.
const STREAMS: [(&str, &[&str], f64); 19] = [
    ("no usage", &[GOOD, DAY, STOP, "[DONE]"], 6.0),
    ("usage first", &[USED, GOOD, DAY, STOP, "[DONE]"], 7.0),
    (
        "usage with the last choice",
        &[
            GOOD,
            DAY,
            r#"{"choices":[{"delta":{},"finish_reason":"stop"}],"usage":{"prompt_tokens":3,"completion_tokens":2}}"#,
        ],
        7.0,
    ),
    (
        "usage in the choice",
        &[
            GOOD,
            DAY,
            r#"{"choices":[{"delta":{},"finish_reason":"stop","usage":{"prompt_tokens":3,"completion_tokens":2}}]}"#,
        ],
        7.0,
    ),
    (
        "usage in every chunk",
        &[
            r#"{"choices":[{"delta":{"content":"Good "}}],"usage":{"prompt_tokens":3,"completion_tokens":1}}"#,
            r#"{"choices":[{"delta":{"content":"day"}}],"usage":{"prompt_tokens":3,"completion_tokens":2}}"#,
            STOP,
        ],
        7.0,
    ),
    (
        "usage of null until the last",
        &[
            r#"{"choices":[{"delta":{"content":"Good day"}}],"usage":null}"#,
            r#"{"choices":[{"delta":{},"finish_reason":"stop"}],"usage":null}"#,
            USED,
            "[DONE]",
        ],
        7.0,
    ),
    (
        "usage of zero until the last",
        &[
            r#"{"choices":[{"delta":{"content":"Good day"}}],"usage":{"prompt_tokens":0,"completion_tokens":0}}"#,
            STOP,
            USED,
        ],
        7.0,
    ),
    (
        "usage before a null",
        &[GOOD, DAY, USED, r#"{"choices":[],"usage":null}"#, STOP],
        7.0,
    ),
    (
        "choices of null first",
        &[
            r#"{"choices":null,"prompt_filter_results":[]}"#,
            GOOD,
            DAY,
            STOP,
            USED,
        ],
        7.0,
    ),
    (
        "no choices first",
        &[
            r#"{"id":"1","object":"chat.completion.chunk"}"#,
            GOOD,
            DAY,
            STOP,
            USED,
        ],
        7.0,
    ),
    (
        "a delta of null",
        &[r#"{"choices":[{"delta":null}]}"#, GOOD, DAY, STOP, USED],
        7.0,
    ),
    (
        "no delta",
        &[r#"{"choices":[{"index":0}]}"#, GOOD, DAY, STOP, USED],
        7.0,
    ),
    (
        "content of null",
        &[
            r#"{"choices":[{"delta":{"content":null}}]}"#,
            GOOD,
            DAY,
            STOP,
            USED,
        ],
        7.0,
    ),
    (
        "parts",
        &[
            r#"{"choices":[{"delta":{"content":[{"type":"text","text":"Good "},{"type":"text","text":"day"}]}}]}"#,
            STOP,
            USED,
        ],
        7.0,
    ),
    (
        "a part that is thought",
        &[
            r#"{"choices":[{"delta":{"content":[{"type":"thinking","thinking":[{"type":"text","text":"no"}]}]}}]}"#,
            GOOD,
            DAY,
            STOP,
            USED,
        ],
        7.0,
    ),
    (
        "thoughts beside the text",
        &[
            r#"{"choices":[{"delta":{"reasoning_content":"no","content":null}}]}"#,
            GOOD,
            DAY,
            STOP,
            USED,
        ],
        7.0,
    ),
    (
        "an empty reason",
        &[
            r#"{"choices":[{"delta":{"content":"Good "},"finish_reason":""}]}"#,
            DAY,
            STOP,
            USED,
        ],
        7.0,
    ),
    (
        "errors of null",
        &[
            r#"{"choices":[{"delta":{"content":"Good "},"error":null}],"error":null}"#,
            DAY,
            STOP,
            USED,
        ],
        7.0,
    ),
    (
        "a reason with the text",
        &[
            GOOD,
            r#"{"choices":[{"delta":{"content":"day"},"finish_reason":"stop"}]}"#,
            USED,
        ],
        7.0,
    ),
];

/// Events that fail a stream, alone or after a text, and whether it may be charged
/// for what it read although it wrote nothing.
const FAILURES: [(&str, &str, bool); 13] = [
    (
        "an error",
        "data: {\"error\":{\"message\":\"no\"}}\n\n",
        false,
    ),
    (
        "an error by name",
        "event: error\ndata: {\"message\":\"no\"}\n\n",
        false,
    ),
    ("an error of text", "event: error\ndata: no\n\n", false),
    (
        "an object",
        "data: {\"object\":\"error\",\"message\":\"no\",\"code\":500}\n\n",
        false,
    ),
    ("a message", "data: {\"message\":\"no\"}\n\n", false),
    ("a detail", "data: {\"detail\":\"no\"}\n\n", false),
    (
        "a choice",
        "data: {\"choices\":[{\"delta\":{},\"error\":{\"code\":502}}]}\n\n",
        false,
    ),
    (
        "a reason",
        "data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"error\"}]}\n\n",
        false,
    ),
    ("an end", "", false),
    ("comments", ": hello\n\n: hello\n\n", false),
    ("a mark of the end", "data: [DONE]\n\n", false),
    ("no JSON", "data: <html>\n\n", true),
    ("half of a chunk", "data: {\"choices\":[{\"del", true),
];

fn streams() -> Vec<Scenario> {
    let mut all = Vec::new();
    for (name, events, cost) in STREAMS {
        let expected = answered("Good day", "stop", cost);
        all.push(streamed(name, Script::events(framed(events)), expected));
    }
    for (name, event, charged) in FAILURES {
        let cost = if charged { 2.0 } else { 0.0 };
        let failed = fell_back("UNAVAILABLE", cost);
        let name = format!("a failure: {name}");
        all.push(streamed(&name, Script::events(event), failed.clone()));
        let events = format!("{}{event}", framed(&[ROLE]));
        all.push(streamed(
            &format!("{name}, after the role"),
            Script::events(events),
            failed,
        ));
        // What the caller got is charged: one read costs one, one written two.
        let events = format!("{}{event}", framed(&[ROLE, GOOD]));
        let failed = failed_after("Good ", 6.0);
        all.push(streamed(
            &format!("{name}, after a text"),
            Script::events(events),
            failed,
        ));
    }
    all
}

/// Streams that fail by more than one event.
fn breaks() -> Vec<Scenario> {
    let mut all = Vec::new();
    let used = framed(&[
        r#"{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":0}}"#,
        ERROR,
    ]);
    all.push(streamed(
        "usage, then an error",
        Script::events(used),
        fell_back("UNAVAILABLE", 3.0),
    ));
    let mut invalid = framed(&[GOOD]).into_bytes();
    invalid.extend(b"data: \xff\n\n");
    all.push(streamed(
        "no UTF-8 after a text",
        Script::events(invalid),
        failed_after("Good ", 6.0),
    ));
    let mut silent = Script::events(framed(&[ROLE]));
    silent.falls_silent = true;
    all.push(streamed(
        "silence after the role",
        silent,
        fell_back("DEADLINE_EXCEEDED", 2.0),
    ));
    let mut silent = Script::events(framed(&[ROLE, GOOD]));
    silent.falls_silent = true;
    all.push(streamed(
        "silence after a text",
        silent,
        failed_after("Good ", 6.0),
    ));
    let mut comments = Script::events("");
    comments.stays_alive = true;
    let late = fell_back("DEADLINE_EXCEEDED", 2.0);
    all.push(streamed("comments and no end", comments, late));
    let call = r#"{"choices":[{"delta":{"tool_calls":[{"index":0,"id":"1","function":{"name":"f","arguments":"{}"}}]}}]}"#;
    let end = r#"{"choices":[{"delta":{},"finish_reason":"tool_calls"}]}"#;
    let called = Script::events(framed(&[ROLE, call, end, USED]));
    all.push(streamed(
        "a call of a tool",
        called,
        answered("", "tool_calls", 7.0),
    ));
    // A call is as much of an answer as a text.
    let failed = Script::events(framed(&[ROLE, call, ERROR]));
    all.push(streamed(
        "an error after a call",
        failed,
        failed_after("", 4.0),
    ));
    all
}
