//! Options that several commands share.

use std::collections::HashMap;

use http::{HeaderName, HeaderValue};
use protocol::inference::InferParameter;
use protocol::inference::infer_parameter::ParameterChoice;

/// Metadata that holds secrets, which come from files or variables alone.
const SECRET_HEADERS: [&str; 3] = ["authorization", "x-api-key", "api-key"];

/// The format of a command's output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum OutputFormat {
    /// Human-readable; long values are shortened
    Table,
    /// For programs; complete
    Json,
}

/// Splits `KEY=VALUE` at the first equals sign.
pub fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("must be KEY=VALUE".to_owned()),
    }
}

/// Checks `HOST:PORT`.
pub fn host_and_port(text: &str) -> Result<String, String> {
    match text.rsplit_once(':') {
        Some((host, port)) if !host.is_empty() && !host.contains('/') => {
            match port.parse::<u16>() {
                Ok(_) => Ok(text.to_owned()),
                Err(_) => Err(format!("port '{port}' must be a number from 0 to 65535")),
            }
        }
        _ => Err("must be HOST:PORT, for example 127.0.0.1:8001".to_owned()),
    }
}

/// Parses one entry of a request's metadata, `KEY=VALUE`.
pub fn header(text: &str) -> Result<(HeaderName, HeaderValue), String> {
    let (key, value) = pair(text)?;
    let key: HeaderName = key
        .parse()
        .map_err(|_| format!("'{key}' is not a metadata key: use letters, digits, - and _"))?;
    if key.as_str().ends_with("-bin") || key.as_str().starts_with("grpc-") {
        return Err(format!(
            "'{key}' cannot be set here: it is binary or reserved by gRPC"
        ));
    }
    if SECRET_HEADERS.contains(&key.as_str()) {
        return Err(format!(
            "'{key}' would show a secret in the process list: use --key-file or the variable ANDON_API_KEY"
        ));
    }
    let value = HeaderValue::from_str(&value)
        .map_err(|_| format!("the value of '{key}' must be printable ASCII"))?;
    Ok((key, value))
}

/// Parses a parameter, `KEY=VALUE`: a boolean, an integer, a number, else a
/// string. A value in double quotes is always a string.
pub fn parameter(text: &str) -> Result<(String, ParameterChoice), String> {
    let (key, value) = pair(text)?;
    let quoted = value
        .strip_prefix('"')
        .and_then(|value| value.strip_suffix('"'));
    let choice = if let Some(quoted) = quoted {
        ParameterChoice::StringParam(quoted.to_owned())
    } else if let Ok(boolean) = value.parse() {
        ParameterChoice::BoolParam(boolean)
    } else if let Ok(integer) = value.parse() {
        ParameterChoice::Int64Param(integer)
    } else if let Ok(integer) = value.parse() {
        ParameterChoice::Uint64Param(integer)
    } else if let Some(number) = number(&value) {
        ParameterChoice::DoubleParam(number)
    } else {
        ParameterChoice::StringParam(value)
    };
    Ok((key, choice))
}

/// A number that starts like one: Rust also parses `inf` and `nan`, which are
/// words here.
fn number(text: &str) -> Option<f64> {
    let first = text.trim_start_matches(['-', '+']).chars().next()?;
    if !first.is_ascii_digit() && first != '.' {
        return None;
    }
    text.parse().ok()
}

/// The parameters of a request.
pub fn parameters(parameters: &[(String, ParameterChoice)]) -> HashMap<String, InferParameter> {
    parameters
        .iter()
        .map(|(key, choice)| {
            let parameter = InferParameter {
                parameter_choice: Some(choice.clone()),
            };
            (key.clone(), parameter)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_take_the_type_that_they_look_like() {
        let of = |text: &str| parameter(text).unwrap().1;
        assert_eq!(of("a=true"), ParameterChoice::BoolParam(true));
        assert_eq!(of("a=-5"), ParameterChoice::Int64Param(-5));
        assert_eq!(
            of("a=18446744073709551615"),
            ParameterChoice::Uint64Param(u64::MAX)
        );
        assert_eq!(of("a=0.5"), ParameterChoice::DoubleParam(0.5));
        assert_eq!(of("a=1e3"), ParameterChoice::DoubleParam(1000.0));
        assert_eq!(of("a=nan"), ParameterChoice::StringParam("nan".into()));
        assert_eq!(of("a=\"5\""), ParameterChoice::StringParam("5".into()));
        assert_eq!(of("a=b=c"), ParameterChoice::StringParam("b=c".into()));
        assert_eq!(of("a="), ParameterChoice::StringParam(String::new()));
        assert!(parameter("a").is_err() && parameter("=a").is_err());
    }

    #[test]
    fn addresses_have_a_host_and_a_port() {
        for right in ["localhost:8001", "10.0.0.1:1", "[::1]:8001"] {
            assert!(host_and_port(right).is_ok(), "{right}");
        }
        for wrong in [
            "",
            ":8001",
            "localhost",
            "localhost:",
            "a:70000",
            "http://a:80",
        ] {
            assert!(host_and_port(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn secrets_are_no_headers() {
        for text in [
            "Authorization=Bearer s3cret",
            "x-api-key=s3cret",
            "api-key=s3cret",
        ] {
            let error = header(text).unwrap_err();
            assert!(
                error.contains("--key-file") && !error.contains("s3cret"),
                "{error}"
            );
        }
    }

    #[test]
    fn headers_that_grpc_owns_are_refused() {
        assert!(header("andon-model=minilm").is_ok());
        assert!(header("grpc-timeout=1S").is_err());
        assert!(header("x-bin=AA").is_err());
        assert!(header("a b=c").is_err());
        assert!(header("a=line\nbreak").is_err());
    }
}
