//! Triton's log and trace settings. Each role lends its own levels as fields,
//! and sets them when the request was valid.

use crate::Error;
use crate::FieldPath;
use crate::inference::log_settings_request::setting_value::ParameterChoice as Requested;
use crate::inference::log_settings_response::{
    SettingValue as LogValue, setting_value::ParameterChoice as Reported,
};
use crate::inference::trace_setting_response::SettingValue as TraceValue;
use crate::inference::{
    LogSettingsRequest, LogSettingsResponse, TraceSettingRequest, TraceSettingResponse,
};

/// The levels that are logged.
#[derive(Debug)]
#[allow(missing_docs, reason = "the names say everything")]
pub struct LogSettings<'l> {
    pub error: &'l mut bool,
    pub warning: &'l mut bool,
    pub info: &'l mut bool,
    pub verbose_level: &'l mut u32,
}

impl LogSettings<'_> {
    /// Applies the changes of a request, and returns all settings. After an error
    /// they are changed in part: use none of them.
    pub fn apply(self, request: &LogSettingsRequest) -> Result<LogSettingsResponse, Error> {
        for (name, value) in &request.settings {
            let invalid = |reason| Err(Error::invalid(setting(name), reason));
            let choice = value.parameter_choice.as_ref();
            match (name.as_str(), choice) {
                ("log_error", Some(Requested::BoolParam(on))) => *self.error = *on,
                ("log_warning", Some(Requested::BoolParam(on))) => *self.warning = *on,
                ("log_info", Some(Requested::BoolParam(on))) => *self.info = *on,
                ("log_verbose_level", Some(Requested::Uint32Param(level))) => {
                    *self.verbose_level = *level;
                }
                ("log_error" | "log_warning" | "log_info", _) => {
                    return invalid("must be a boolean");
                }
                ("log_verbose_level", _) => return invalid("must be an unsigned integer"),
                ("log_file" | "log_format", _) => {
                    return invalid("is fixed when the server starts: see --log-format");
                }
                _ => return invalid("is not a known setting"),
            }
        }
        let settings = [
            ("log_error", Reported::BoolParam(*self.error)),
            ("log_warning", Reported::BoolParam(*self.warning)),
            ("log_info", Reported::BoolParam(*self.info)),
            (
                "log_verbose_level",
                Reported::Uint32Param(*self.verbose_level),
            ),
        ];
        let value = |choice| LogValue {
            parameter_choice: Some(choice),
        };
        Ok(LogSettingsResponse {
            settings: settings
                .map(|(name, choice)| (name.to_owned(), value(choice)))
                .into(),
        })
    }
}

/// Whether and how often calls are traced.
#[derive(Debug)]
pub struct TraceSettings<'l> {
    /// Whether a collector is configured.
    pub exports: bool,
    /// Whether calls are traced.
    pub on: &'l mut bool,
    /// One of so many calls that bring no trace of their own.
    pub rate: &'l mut u32,
}

impl TraceSettings<'_> {
    /// Applies the changes of a request, and returns all settings. After an error
    /// they are changed in part: use none of them.
    pub fn apply(self, request: &TraceSettingRequest) -> Result<TraceSettingResponse, Error> {
        if !request.model_name.is_empty() {
            return Err(Error::invalid(
                "model_name",
                "must be empty: tracing is set for the whole server",
            ));
        }
        for (name, value) in &request.settings {
            let invalid = |reason| Err(Error::invalid(setting(name), reason));
            let one = value.value.first().map(String::as_str);
            match (name.as_str(), one) {
                ("trace_level", Some("OFF") | None) => *self.on = false,
                ("trace_level", Some("TIMESTAMPS")) if self.exports => *self.on = true,
                ("trace_level", Some("TIMESTAMPS")) => {
                    return invalid("needs a collector: start the server with --otlp-endpoint");
                }
                ("trace_level", Some(_)) => return invalid("must be OFF or TIMESTAMPS"),
                ("trace_rate", None) => *self.rate = 1,
                ("trace_rate", Some(rate)) => match rate.parse() {
                    Ok(rate) if rate > 0 => *self.rate = rate,
                    _ => return invalid("must be a positive integer"),
                },
                ("trace_mode" | "trace_count" | "trace_file" | "log_frequency", _) => {
                    return invalid("cannot be changed: traces go to the OTLP collector");
                }
                _ => return invalid("is not a known setting"),
            }
        }
        let level = if *self.on { "TIMESTAMPS" } else { "OFF" };
        let settings = [
            ("trace_level", level.to_owned()),
            ("trace_rate", self.rate.to_string()),
            ("trace_mode", "opentelemetry".to_owned()),
        ];
        let value = |value| TraceValue { value: vec![value] };
        Ok(TraceSettingResponse {
            settings: settings
                .map(|(name, text)| (name.to_owned(), value(text)))
                .into(),
        })
    }
}

fn setting(name: &str) -> FieldPath {
    FieldPath::from("settings").key(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inference::log_settings_request::SettingValue;
    use crate::inference::trace_setting_request;

    #[test]
    fn log_settings_are_changed_and_reported() {
        let (mut error, mut warning, mut info, mut verbose_level) = (true, true, true, 0);
        let mut change = |name: &str, choice| {
            let request = LogSettingsRequest {
                settings: [(
                    name.to_owned(),
                    SettingValue {
                        parameter_choice: Some(choice),
                    },
                )]
                .into(),
            };
            let settings = LogSettings {
                error: &mut error,
                warning: &mut warning,
                info: &mut info,
                verbose_level: &mut verbose_level,
            };
            settings.apply(&request)
        };
        let response = change("log_info", Requested::BoolParam(false)).unwrap();
        let reported = response.settings["log_info"].parameter_choice.clone();
        assert_eq!(reported, Some(Reported::BoolParam(false)));
        for (name, choice) in [
            ("log_info", Requested::Uint32Param(1)),
            ("log_verbose_level", Requested::BoolParam(true)),
            ("log_file", Requested::BoolParam(true)),
            ("other", Requested::BoolParam(true)),
        ] {
            let error = change(name, choice).unwrap_err();
            assert_eq!(error.field().unwrap(), format!("settings[{name}]").as_str());
        }
        assert_eq!(
            (error, warning, info, verbose_level),
            (true, true, false, 0)
        );
    }

    #[test]
    fn trace_settings_are_changed_and_reported() {
        let (mut on, mut rate) = (false, 1);
        let mut change = |exports, name: &str, value: &str| {
            let value = trace_setting_request::SettingValue {
                value: vec![value.to_owned()],
            };
            let request = TraceSettingRequest {
                settings: [(name.to_owned(), value)].into(),
                ..Default::default()
            };
            let settings = TraceSettings {
                exports,
                on: &mut on,
                rate: &mut rate,
            };
            settings.apply(&request)
        };
        let response = change(true, "trace_level", "TIMESTAMPS").unwrap();
        assert_eq!(response.settings["trace_level"].value, ["TIMESTAMPS"]);
        change(true, "trace_rate", "7").unwrap();
        for (exports, name, value) in [
            (false, "trace_level", "TIMESTAMPS"),
            (true, "trace_level", "ALL"),
            (true, "trace_rate", "0"),
            (true, "trace_file", "x"),
            (true, "other", "x"),
        ] {
            let error = change(exports, name, value).unwrap_err();
            assert_eq!(error.field().unwrap(), format!("settings[{name}]").as_str());
        }
        assert_eq!((on, rate), (true, 7));
    }
}
