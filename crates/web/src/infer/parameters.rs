//! The parameters of an inference request in JSON.

use std::collections::{BTreeMap, HashMap};
use std::fmt;

use protocol::inference::InferParameter;
use protocol::inference::infer_parameter::ParameterChoice;
use protocol::{Error, PARTS_MAX};
use serde::Deserialize;
use serde::de::{self, DeserializeSeed, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

/// Parameters by their names.
pub type Parameters = BTreeMap<String, Parameter>;

/// Reads so many parameters at most: those of a request count with those of its
/// inputs and outputs.
struct ParametersUpTo(usize);

impl<'de> DeserializeSeed<'de> for ParametersUpTo {
    type Value = Parameters;

    fn deserialize<D: serde::Deserializer<'de>>(self, reader: D) -> Result<Parameters, D::Error> {
        reader.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for ParametersUpTo {
    type Value = Parameters;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a map")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Parameters, A::Error> {
        let (mut parameters, mut entries) = (Parameters::new(), 0);
        while let Some((name, value)) = map.next_entry::<String, Option<Parameter>>()? {
            if entries == self.0 {
                let reason = format!("a request has at most {PARTS_MAX} parameters");
                return Err(de::Error::custom(reason));
            }
            entries += 1;
            // A parameter that is null is absent.
            match value {
                Some(value) => parameters.insert(name, value),
                None => parameters.remove(&name),
            };
        }
        Ok(parameters)
    }
}

/// The value of a parameter; none if it is a list or an object.
pub struct Parameter(pub Option<ParameterChoice>);

impl<'de> Deserialize<'de> for Parameter {
    fn deserialize<D: serde::Deserializer<'de>>(reader: D) -> Result<Self, D::Error> {
        reader.deserialize_any(AnyParameter)
    }
}

struct AnyParameter;

impl<'de> Visitor<'de> for AnyParameter {
    type Value = Parameter;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a boolean, a number or a string")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Parameter, E> {
        Ok(Parameter(Some(ParameterChoice::BoolParam(value))))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Parameter, E> {
        Ok(Parameter(Some(ParameterChoice::Int64Param(value))))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Parameter, E> {
        let choice = match i64::try_from(value) {
            Ok(value) => ParameterChoice::Int64Param(value),
            Err(_) => ParameterChoice::Uint64Param(value),
        };
        Ok(Parameter(Some(choice)))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Parameter, E> {
        Ok(Parameter(Some(ParameterChoice::DoubleParam(value))))
    }

    fn visit_str<E>(self, value: &str) -> Result<Parameter, E> {
        let choice = ParameterChoice::StringParam(value.to_owned());
        Ok(Parameter(Some(choice)))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut rest: A) -> Result<Parameter, A::Error> {
        while rest.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Parameter(None))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut rest: A) -> Result<Parameter, A::Error> {
        while rest.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(Parameter(None))
    }
}

/// The parameters of a request so far.
#[derive(Debug, Default)]
pub struct CountedParameters(usize);

impl CountedParameters {
    /// Reads parameters, which are counted for the whole request. `before` is the
    /// path of their owner.
    pub fn read(&mut self, text: Option<&RawValue>, before: &str) -> Result<Parameters, Error> {
        let Some(text) = text else {
            return Ok(Parameters::new());
        };
        let left = ParametersUpTo(PARTS_MAX - self.0);
        let read = left.deserialize(&mut serde_json::Deserializer::from_str(text.get()));
        let read = read.map_err(|error| {
            let error = error.to_string();
            let reason = if text.get().starts_with('{') {
                let read = error.rsplit_once(" at line ");
                read.map_or("", |(reason, _)| reason)
            } else {
                "must be an object"
            };
            Error::invalid(format!("{before}parameters"), reason)
        })?;
        self.0 += read.len();
        Ok(read)
    }
}

/// The value of a boolean parameter.
pub fn boolean(value: Parameter, field: impl Fn() -> String) -> Result<bool, Error> {
    match value.0 {
        Some(ParameterChoice::BoolParam(value)) => Ok(value),
        _ => Err(Error::invalid(field(), "must be a boolean")),
    }
}

/// The parameters of the message, if each has a value.
pub fn checked(
    parameters: Parameters,
    before: &str,
) -> Result<HashMap<String, InferParameter>, Error> {
    let checked = |(key, value): (String, Parameter)| match value.0 {
        None => {
            let field = format!("{before}parameters[{key}]");
            Err(Error::invalid(
                field,
                "must be a boolean, a number or a string",
            ))
        }
        parameter_choice => Ok((key, InferParameter { parameter_choice })),
    };
    parameters.into_iter().map(checked).collect()
}
