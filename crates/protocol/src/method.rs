//! The calls of the protos as a type, made by `build.rs` from the descriptors.
#![allow(
    clippy::too_many_lines,
    reason = "generated: each match has an arm for each method"
)]

use crate::{peek_count, peek_rows};

include!(concat!(env!("OUT_DIR"), "/methods.rs"));

/// The field of a `RerankRequest` that holds the texts.
const RERANK_TEXTS: u32 = 2;

impl Method {
    /// The rows that an encoded message of this method brings: what a batch, a
    /// quota and the metrics count. Methods that compute nothing on a device
    /// have none.
    pub fn rows(self, message: &[u8]) -> u64 {
        match self {
            Self::ModelInfer | Self::ModelStreamInfer => peek_rows(message),
            Self::Rerank => peek_count(message, RERANK_TEXTS),
            _ => match self.service() {
                Service::Embed | Service::Predict | Service::Rerank => 1,
                Service::Inference | Service::TeiInfo | Service::Tokenize | Service::Report => 0,
            },
        }
    }
}

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

    #[test]
    fn rows_are_those_of_the_message() {
        let rerank = crate::tei::v1::RerankRequest {
            texts: vec!["a".into(), "b".into(), "c".into()],
            ..Default::default()
        };
        let bytes = rerank.encode_to_vec();
        assert_eq!(Method::Rerank.rows(&bytes), 3);
        assert_eq!(Method::Embed.rows(&bytes), 1);
        assert_eq!(Method::Tokenize.rows(&bytes), 0);
        assert_eq!(Method::TeiInfo.rows(&bytes), 0);
        assert_eq!(Method::ModelMetadata.rows(&bytes), 0);
        let infer = crate::inference::ModelInferRequest {
            inputs: vec![crate::inference::model_infer_request::InferInputTensor {
                shape: vec![5, 2],
                ..Default::default()
            }],
            raw_input_contents: vec![vec![0; 10].into()],
            ..Default::default()
        };
        assert_eq!(Method::ModelInfer.rows(&infer.encode_to_vec()), 5);
    }
}
