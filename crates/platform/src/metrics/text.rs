//! Prometheus's text format, 0.0.4, which every scraper reads. The library writes
//! OpenMetrics alone: the samples are the same, what describes them is not.

/// The text of an OpenMetrics page in Prometheus's format. A counter is described
/// there by the name of its samples. A metric that is `unknown` in OpenMetrics is
/// a counter without the `_total` that OpenMetrics demands of one.
pub(super) fn from_open_metrics(page: &str) -> String {
    let mut text = String::with_capacity(page.len());
    let mut help = "";
    for line in page.lines() {
        if let Some(described) = line.strip_prefix("# HELP ") {
            help = described.split_once(' ').map_or("", |(_, help)| help);
        } else if let Some(typed) = line.strip_prefix("# TYPE ") {
            push_description(&mut text, typed, help);
        } else if !line.starts_with('#') {
            // Neither the units nor the end of the page are in this format.
            text.push_str(line);
            text.push('\n');
        }
    }
    text
}

/// Describes the metric of a line of OpenMetrics, which has its name and type.
fn push_description(text: &mut String, typed: &str, help: &str) {
    let (name, kind) = typed.split_once(' ').unwrap_or((typed, "untyped"));
    let (suffix, kind) = match kind {
        "counter" => ("_total", "counter"),
        "unknown" => ("", "counter"),
        "info" => ("_info", "gauge"),
        other => ("", other),
    };
    for part in ["# HELP ", name, suffix, " ", help, "\n"] {
        text.push_str(part);
    }
    for part in ["# TYPE ", name, suffix, " ", kind, "\n"] {
        text.push_str(part);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_described_by_the_names_of_their_samples() {
        let page = "\
# HELP calls Calls, by code.
# TYPE calls counter
calls_total{code=\"# EOF\"} 3
# HELP build The version.
# TYPE build info
build_info{version=\"1\"} 1
# HELP nv_count Rows computed
# TYPE nv_count unknown
nv_count{model=\"m\"} 7
# HELP wait_seconds The wait.
# TYPE wait_seconds histogram
# UNIT wait_seconds seconds
wait_seconds_sum 0.5
wait_seconds_count 1
wait_seconds_bucket{le=\"+Inf\"} 1
# HELP open Open connections.
# TYPE open gauge
# EOF
";
        let text = "\
# HELP calls_total Calls, by code.
# TYPE calls_total counter
calls_total{code=\"# EOF\"} 3
# HELP build_info The version.
# TYPE build_info gauge
build_info{version=\"1\"} 1
# HELP nv_count Rows computed
# TYPE nv_count counter
nv_count{model=\"m\"} 7
# HELP wait_seconds The wait.
# TYPE wait_seconds histogram
wait_seconds_sum 0.5
wait_seconds_count 1
wait_seconds_bucket{le=\"+Inf\"} 1
# HELP open Open connections.
# TYPE open gauge
";
        assert_eq!(from_open_metrics(page), text);
    }
}
