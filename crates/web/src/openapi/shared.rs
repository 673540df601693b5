//! What several operations have. It stands once, among the components, and they
//! refer to it: Swagger UI resolves the whole document for each operation that is
//! opened, so what is repeated costs its reader time.

use std::collections::BTreeMap;

use utoipa::openapi::path::Parameter;
use utoipa::openapi::{Components, Header, Ref, RefOr, Response};

/// Puts a parameter among the components, and refers to it.
pub(super) fn parameter(
    components: &mut Components,
    name: &str,
    parameter: Parameter,
) -> RefOr<Parameter> {
    add(&mut components.parameters, name, parameter);
    reference("parameters", name)
}

/// Puts a header of responses among the components, and refers to it.
pub(super) fn header(components: &mut Components, name: &str, header: Header) -> RefOr<Header> {
    add(&mut components.headers, name, header);
    reference("headers", name)
}

/// Puts a response among the components, and refers to it.
pub(super) fn response(
    components: &mut Components,
    name: &str,
    response: Response,
) -> RefOr<Response> {
    add(&mut components.responses, name, response);
    reference("responses", name)
}

/// Adds a value, unless an operation before added it: a name stands for one value.
fn add<T>(known: &mut BTreeMap<String, RefOr<T>>, name: &str, value: T) {
    known.entry(name.to_owned()).or_insert(RefOr::T(value));
}

fn reference<T>(section: &str, name: &str) -> RefOr<T> {
    RefOr::Ref(Ref::new(format!("#/components/{section}/{name}")))
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::BTreeSet;

    use serde_json::Value;

    use super::super::JSON;
    use super::*;

    /// How often a part may stand in the operations: statistics have three paths
    /// with one response.
    const REPEATED_MAX: usize = 3;
    /// Objects, arrays and values of the document, for each of which Swagger UI takes
    /// its time whenever an operation is opened. There are about 4,700; were the
    /// errors of all operations inline, there would be 11,600.
    const NODES_MAX: usize = 5_300;

    fn written() -> Value {
        serde_json::from_slice(&JSON).unwrap()
    }

    /// What a part of a document stands for: itself, or what it refers to.
    pub fn resolved<'d>(document: &'d Value, part: &'d Value) -> &'d Value {
        match part["$ref"].as_str() {
            Some(reference) => target(document, reference).unwrap(),
            None => part,
        }
    }

    fn target<'d>(document: &'d Value, reference: &str) -> Option<&'d Value> {
        document.pointer(reference.strip_prefix('#')?)
    }

    /// Every object, array and value of a part.
    fn nodes(part: &Value) -> Vec<&Value> {
        let mut found = vec![part];
        let mut read = 0;
        while let Some(node) = found.get(read).copied() {
            match node {
                Value::Object(fields) => found.extend(fields.values()),
                Value::Array(elements) => found.extend(elements),
                _ => {}
            }
            read += 1;
        }
        found
    }

    fn references(document: &Value) -> BTreeSet<&str> {
        let nodes = nodes(document).into_iter();
        nodes.filter_map(|node| node["$ref"].as_str()).collect()
    }

    fn operations(document: &Value) -> impl Iterator<Item = &Value> {
        let paths = document["paths"].as_object().unwrap();
        paths
            .values()
            .flat_map(|item| item.as_object().unwrap().values())
    }

    #[test]
    fn every_reference_is_there_and_every_component_is_referred_to() {
        let document = written();
        let references = references(&document);
        for reference in &references {
            let target = target(&document, reference);
            assert!(target.is_some_and(Value::is_object), "{reference}");
        }
        for section in ["headers", "parameters", "responses"] {
            let components = document["components"][section].as_object().unwrap();
            for name in components.keys() {
                let reference = format!("#/components/{section}/{name}");
                assert!(references.contains(&*reference), "{reference}");
            }
        }
    }

    #[test]
    fn what_is_repeated_stands_among_the_components() {
        let document = written();
        let mut counts = BTreeMap::<String, usize>::new();
        let mut count = |part: &Value| {
            if part.get("$ref").is_none() {
                *counts.entry(part.to_string()).or_default() += 1;
            }
        };
        let mut responses = Vec::new();
        for operation in operations(&document) {
            let parameters = operation["parameters"].as_array().unwrap();
            parameters.iter().for_each(&mut count);
            responses.extend(operation["responses"].as_object().unwrap().values());
        }
        for response in &responses {
            count(response);
        }
        let components = document["components"]["responses"].as_object().unwrap();
        responses.extend(components.values());
        for headers in responses.iter().filter_map(|it| it["headers"].as_object()) {
            headers.values().for_each(&mut count);
        }
        for (part, times) in counts {
            assert!(times <= REPEATED_MAX, "{times} times: {part}");
        }
    }

    #[test]
    fn the_document_is_small() {
        let count = nodes(&written()).len();
        assert!(count <= NODES_MAX, "{count} nodes");
    }
}
