//! Triton's log and trace settings in plain terms.

use std::collections::HashMap;

use crate::Error;
use crate::inference::log_settings_request::setting_value::ParameterChoice as Asked;
use crate::inference::log_settings_response::{
    SettingValue as LogValue, setting_value::ParameterChoice as Answered,
};
use crate::inference::trace_setting_response::SettingValue as TraceValue;
use crate::inference::{
    LogSettingsRequest, LogSettingsResponse, TraceSettingRequest, TraceSettingResponse,
};

/// What is logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say everything")]
pub struct LogSettings {
    pub error: bool,
    pub warning: bool,
    pub info: bool,
    pub verbose_level: u32,
}

impl LogSettings {
    /// These settings with what a request changes.
    pub fn changed_by(mut self, request: &LogSettingsRequest) -> Result<Self, Error> {
        for (name, value) in &request.settings {
            let field = || format!("settings[{name}]");
            let choice = value.parameter_choice.as_ref();
            match (name.as_str(), choice) {
                ("log_error", Some(Asked::BoolParam(on))) => self.error = *on,
                ("log_warning", Some(Asked::BoolParam(on))) => self.warning = *on,
                ("log_info", Some(Asked::BoolParam(on))) => self.info = *on,
                ("log_verbose_level", Some(Asked::Uint32Param(level))) => {
                    self.verbose_level = *level;
                }
                ("log_error" | "log_warning" | "log_info", _) => {
                    return Err(Error::invalid(field(), "must be a boolean"));
                }
                ("log_verbose_level", _) => {
                    return Err(Error::invalid(field(), "must be an unsigned integer"));
                }
                ("log_file" | "log_format", _) => {
                    return Err(Error::invalid(
                        field(),
                        "is fixed when the server starts: see --log-format",
                    ));
                }
                _ => return Err(Error::invalid(field(), "unknown setting")),
            }
        }
        Ok(self)
    }

    /// These settings as an answer.
    pub fn to_response(self) -> LogSettingsResponse {
        let flag = |on| Answered::BoolParam(on);
        let settings = [
            ("log_error", flag(self.error)),
            ("log_warning", flag(self.warning)),
            ("log_info", flag(self.info)),
            (
                "log_verbose_level",
                Answered::Uint32Param(self.verbose_level),
            ),
        ];
        LogSettingsResponse {
            settings: settings
                .into_iter()
                .map(|(name, choice)| {
                    let value = LogValue {
                        parameter_choice: Some(choice),
                    };
                    (name.to_owned(), value)
                })
                .collect(),
        }
    }
}

/// What is traced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceSettings {
    /// Whether there is a collector to send traces to.
    pub exports: bool,
    /// Whether calls are traced.
    pub on: bool,
    /// One of so many calls that bring no trace of their own.
    pub rate: u32,
}

impl TraceSettings {
    /// These settings with what a request changes.
    pub fn changed_by(mut self, request: &TraceSettingRequest) -> Result<Self, Error> {
        if !request.model_name.is_empty() {
            return Err(Error::invalid(
                "model_name",
                "tracing is set for the whole server: leave it empty",
            ));
        }
        for (name, value) in &request.settings {
            let field = || format!("settings[{name}]");
            let one = value.value.first().map(String::as_str);
            match (name.as_str(), one) {
                ("trace_level", Some("OFF") | None) => self.on = false,
                ("trace_level", Some("TIMESTAMPS")) if self.exports => self.on = true,
                ("trace_level", Some("TIMESTAMPS")) => {
                    return Err(Error::invalid(
                        field(),
                        "no collector is configured: start with --otlp-endpoint",
                    ));
                }
                ("trace_level", Some(_)) => {
                    return Err(Error::invalid(field(), "must be OFF or TIMESTAMPS"));
                }
                ("trace_rate", None) => self.rate = 1,
                ("trace_rate", Some(rate)) => {
                    self.rate = rate.parse().ok().filter(|&rate| rate > 0).ok_or_else(|| {
                        Error::invalid(field(), "must be a positive whole number")
                    })?;
                }
                ("trace_mode" | "trace_count" | "trace_file" | "log_frequency", _) => {
                    return Err(Error::invalid(
                        field(),
                        "cannot be changed: traces go to the OTLP collector",
                    ));
                }
                _ => return Err(Error::invalid(field(), "unknown setting")),
            }
        }
        Ok(self)
    }

    /// These settings as an answer.
    pub fn to_response(self) -> TraceSettingResponse {
        let settings: HashMap<_, _> = [
            (
                "trace_level",
                if self.on { "TIMESTAMPS" } else { "OFF" }.to_owned(),
            ),
            ("trace_rate", self.rate.to_string()),
            ("trace_mode", "opentelemetry".to_owned()),
        ]
        .into_iter()
        .map(|(name, value)| (name.to_owned(), TraceValue { value: vec![value] }))
        .collect();
        TraceSettingResponse { settings }
    }
}
