//! The calls of the protos as a type, made by `build.rs` from the descriptors.
#![allow(
    clippy::too_many_lines,
    reason = "generated: each match has an arm for each method"
)]

include!(concat!(env!("OUT_DIR"), "/methods.rs"));

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message as _;
    use prost_types::FileDescriptorSet;

    #[test]
    fn every_path_of_the_descriptors_is_a_method() {
        let descriptors = FileDescriptorSet::decode(crate::DESCRIPTORS).unwrap();
        let mut count = 0;
        for file in &descriptors.file {
            for service in &file.service {
                for descriptor in &service.method {
                    let service = format!("{}.{}", file.package(), service.name());
                    let path = format!("/{service}/{}", descriptor.name());
                    let method = Method::from_path(&path).unwrap();
                    assert_eq!(method.path(), path);
                    assert_eq!(method.name(), descriptor.name());
                    assert_eq!(method.service().name(), service);
                    let streams = (descriptor.client_streaming(), descriptor.server_streaming());
                    let known = (method.is_client_streaming(), method.is_server_streaming());
                    assert_eq!(known, streams, "{path}");
                    count += 1;
                }
            }
        }
        assert_eq!(Method::ALL.len(), count);
        for method in Method::ALL {
            assert_eq!(Method::from_path(method.path()), Some(method));
        }
    }

    #[test]
    fn other_paths_are_no_methods() {
        for path in [
            "",
            "/",
            "/tei.v1.Embed/Embe",
            "/tei.v1.Embed/embed",
            "/tei.v1.Embed/Embed/",
            "tei.v1.Embed/Embed",
            "/grpc.health.v1.Health/Check",
        ] {
            assert_eq!(Method::from_path(path), None, "{path}");
        }
    }

    #[test]
    fn a_stream_has_its_method_for_one_message() {
        for (stream, one) in [
            (Method::ModelStreamInfer, Some(Method::ModelInfer)),
            (Method::EmbedStream, Some(Method::Embed)),
            (Method::EmbedSparseStream, Some(Method::EmbedSparse)),
            (Method::PredictPairStream, Some(Method::PredictPair)),
            (Method::RerankStream, Some(Method::Rerank)),
            (Method::DecodeStream, Some(Method::Decode)),
            (Method::ModelInfer, None),
            (Method::Embed, None),
            (Method::WatchReport, None),
        ] {
            assert_eq!(stream.unary(), one, "{stream:?}");
        }
        let streams = Method::ALL.into_iter().filter(|m| m.is_client_streaming());
        assert!(streams.into_iter().all(|stream| stream.unary().is_some()));
    }
}
