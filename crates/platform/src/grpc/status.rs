//! The length of statuses. They travel in a list of headers, and a list that is
//! too long for the other end closes the connection that all callers share.

use std::borrow::Cow;

use tonic::Status;
use tonic_types::StatusExt;

/// The longest message of a status, as it is encoded.
const MESSAGE_BYTES_MAX: usize = 4 << 10;
/// The longest details of a status.
const DETAILS_BYTES_MAX: usize = 5 << 10;
/// What stands in the place of the rest.
const CUT: char = '…';

/// The same status, with a message and details that are short enough.
pub(super) fn bounded(status: &Status) -> Cow<'_, Status> {
    let message = cut(status.message());
    let too_long = status.details().len() > DETAILS_BYTES_MAX;
    if message.len() == status.message().len() && !too_long {
        return Cow::Borrowed(status);
    }
    // The details repeat the message.
    let details = status.get_error_details();
    let metadata = status.metadata().clone();
    let code = status.code();
    let bounded =
        Status::with_error_details_and_metadata(code, message.clone(), details, metadata.clone());
    if bounded.details().len() <= DETAILS_BYTES_MAX {
        return Cow::Owned(bounded);
    }
    Cow::Owned(Status::with_metadata(code, message, metadata))
}

/// The beginning of a text that is not too long when it is percent-encoded.
fn cut(text: &str) -> Cow<'_, str> {
    if text.len() * 3 <= MESSAGE_BYTES_MAX {
        return Cow::Borrowed(text);
    }
    let encoded = |letter: char| match letter {
        '%' => 3,
        ' '..='~' => 1,
        letter => 3 * letter.len_utf8(),
    };
    let (mut bytes, mut end) = (0, 0);
    for (index, letter) in text.char_indices() {
        bytes += encoded(letter);
        if bytes + encoded(CUT) <= MESSAGE_BYTES_MAX {
            end = index + letter.len_utf8();
        }
        if bytes > MESSAGE_BYTES_MAX {
            return Cow::Owned(format!("{}{CUT}", &text[..end]));
        }
    }
    Cow::Borrowed(text)
}

#[cfg(test)]
mod tests {
    use super::super::{head_status, invalid, reject};
    use super::*;

    #[test]
    fn a_status_is_as_long_as_headers_may_be() {
        for (field, description) in [
            ("inputs[0].name".to_owned(), "x".repeat(8 << 20)),
            ("é".repeat(8 << 20), "is unknown".to_owned()),
            ("%".repeat(3000), "\n".repeat(3000)),
        ] {
            let status = invalid(&field, &description);
            let reply = reject(&status);
            let values = reply.headers().iter();
            let bytes: usize = values
                .map(|(name, value)| name.as_str().len() + value.len())
                .sum();
            assert!(bytes <= 12 << 10, "{bytes} bytes");
            let received = head_status(reply.headers()).unwrap();
            assert_eq!(received.code(), status.code());
            assert!(received.message().ends_with(CUT));
            let begin = received.message().trim_end_matches(CUT);
            assert!(status.message().starts_with(begin) && begin.len() > 1000);
        }
    }

    #[test]
    fn a_short_status_stays_as_it_is() {
        let long = "y".repeat(MESSAGE_BYTES_MAX - 100);
        for description in ["must be 1", long.as_str()] {
            let status = invalid("inputs", description);
            let same = bounded(&status);
            assert_eq!(same.message(), status.message());
        }
        let status = invalid("inputs", "must be 1");
        assert!(matches!(bounded(&status), Cow::Borrowed(_)));
    }

    #[test]
    fn a_long_message_keeps_short_details() {
        let details = tonic_types::ErrorDetails::with_bad_request_violation("a", "b");
        let code = tonic::Code::InvalidArgument;
        let status = Status::with_error_details(code, "z".repeat(1 << 20), details);
        let same = bounded(&status);
        assert!(same.details().len() <= DETAILS_BYTES_MAX);
        let violations = same.get_error_details().bad_request().cloned().unwrap();
        assert_eq!(violations.field_violations[0].field, "a");
    }
}
