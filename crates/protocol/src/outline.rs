//! What a message has, counted in one pass before anything is decoded or made for
//! it: a few bytes may claim millions of inputs, and may hide their rows from a
//! reader that skips what it does not know.

use std::collections::HashMap;
use std::sync::LazyLock;

use prost::Message as _;
use prost::encoding::{WireType, decode_key, decode_varint};
use prost_types::field_descriptor_proto::{Label, Type};
use prost_types::{DescriptorProto, FieldDescriptorProto, FileDescriptorSet};
use tensor::{Shape, TensorError};

use crate::{DESCRIPTORS, Error, FieldPath, Method, Service};

/// The most inputs, outputs or parameters of a request, whatever its model.
pub const PARTS_MAX: usize = 4096;
/// The most fields of a message, those within its fields included: to read so
/// many takes some milliseconds.
pub const FIELDS_MAX: u64 = 1 << 22;
/// The messages of the protos nest less deep.
const DEPTH_MAX: usize = 8;
/// The slots of a message's repeated fields: those of high numbers share one.
const SLOTS: usize = 16;
/// What an entry of a list takes when it is decoded, besides its own contents: a
/// slice of the message, a string, and a message of the protos.
const SLICE_BYTES: u64 = 32;
const STRING_BYTES: u64 = 24;
const MESSAGE_BYTES: u64 = 320;

/// What an encoded request has.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Outline {
    /// The rows, which a batch, a quota and the metrics count. At least one for
    /// a method that computes, and none for any other.
    pub rows: u64,
    /// The fields, those within fields included: each becomes a value of its own
    /// when the message is decoded.
    pub fields: u64,
    /// The bytes that decoding and checking it makes, besides the message: lists
    /// with the room that they grow to, and one copy of the contents, which is
    /// what numbers become when a tensor is made of them.
    pub decoded_bytes: u64,
}

impl Method {
    /// Reads an encoded request of this method: fields that are not known are
    /// skipped. Errors when it is no protobuf, has groups, or has more inputs,
    /// outputs, parameters or dimensions than any model takes.
    pub fn outline(self, message: &[u8]) -> Result<Outline, Error> {
        let layouts = &*LAYOUTS;
        let mut reader = Reader {
            layouts,
            counts: Counts::default(),
        };
        if let Some(layout) = layouts.of_method.get(&self) {
            reader.read(*layout, message, DEPTH_MAX)?;
        }
        let counts = reader.counts;
        Ok(Outline {
            rows: self.rows(&counts, message.len() as u64)?,
            fields: counts.fields,
            decoded_bytes: counts.decoded_bytes,
        })
    }

    fn rows(self, counts: &Counts, bytes: u64) -> Result<u64, Error> {
        match (self.service(), self) {
            (_, Self::ModelInfer | Self::ModelStreamInfer) => counts.rows_of_inputs(bytes),
            (_, Self::Rerank) => Ok(counts.texts.max(1)),
            (Service::Embed | Service::Predict | Service::Rerank, _) => Ok(1),
            (Service::Inference | Service::TeiInfo | Service::Tokenize | Service::Report, _) => {
                Ok(0)
            }
        }
    }
}

#[derive(Debug, Default)]
struct Counts {
    fields: u64,
    decoded_bytes: u64,
    inputs: usize,
    outputs: usize,
    parameters: usize,
    /// Of the input that is read.
    dimensions: usize,
    /// The first dimension of the first input.
    first_dimension: Option<i64>,
    texts: u64,
}

impl Counts {
    /// A request without an input or a dimension is one row, and so is one whose
    /// first dimension is 0: somebody computes it.
    fn rows_of_inputs(&self, bytes: u64) -> Result<u64, Error> {
        let size = self.first_dimension.unwrap_or(1);
        let invalid = |reason: String| Error::invalid(FieldPath::input(0).field("shape"), reason);
        let rows = u64::try_from(size)
            .map_err(|_| invalid(TensorError::NegativeDimension { axis: 0, size }.to_string()))?;
        if rows > bytes {
            let reason = format!("has {rows} rows, but the whole message has {bytes} bytes");
            return Err(invalid(reason));
        }
        Ok(rows.max(1))
    }

    /// Counts a field for what it is.
    fn count(&mut self, role: Role) -> Result<(), Error> {
        let (count, list) = match role {
            Role::Input => {
                self.dimensions = 0;
                (&mut self.inputs, "inputs")
            }
            Role::Output => (&mut self.outputs, "outputs"),
            Role::Parameter => (&mut self.parameters, "parameters"),
            Role::Text => {
                self.texts += 1;
                return Ok(());
            }
            Role::Shape | Role::Other => return Ok(()),
        };
        *count += 1;
        if *count > PARTS_MAX {
            let reason = format!("has over {PARTS_MAX} entries, the limit for a request");
            return Err(Error::invalid(list, reason));
        }
        Ok(())
    }

    fn dimension(&mut self, size: u64) -> Result<(), Error> {
        // The wire has the two's complement of an int64.
        let size = i64::from_ne_bytes(size.to_ne_bytes());
        self.dimensions += 1;
        if self.dimensions > Shape::RANK_MAX {
            let field = FieldPath::input(self.inputs.saturating_sub(1)).field("shape");
            let reason = format!("has over {} dimensions, the limit", Shape::RANK_MAX);
            return Err(Error::invalid(field, reason));
        }
        if self.inputs == 1 {
            self.first_dimension.get_or_insert(size);
        }
        Ok(())
    }
}

struct Reader<'l> {
    layouts: &'l Layouts,
    counts: Counts,
}

impl Reader<'_> {
    fn read(&mut self, layout: usize, message: &[u8], depth: usize) -> Result<(), Error> {
        let mut rest = message;
        let mut lists = [0; SLOTS];
        while !rest.is_empty() {
            self.counts.fields += 1;
            if self.counts.fields > FIELDS_MAX {
                let reason = format!("has over {FIELDS_MAX} fields, the limit for a request");
                return Err(Error::invalid("message", reason));
            }
            let (tag, wire_type) = decode_key(&mut rest).map_err(malformed)?;
            let content = Content::take(&mut rest, wire_type)?;
            let Some(field) = self.layouts.field(layout, tag) else {
                continue;
            };
            if !field.accepts(wire_type) {
                return Err(malformed(format_args!("field {tag} has another type")));
            }
            self.counts.count(field.role)?;
            let (listed, copied) = field.decoded_bytes(&content);
            lists[field.slot()] += listed;
            self.counts.decoded_bytes += copied;
            match (field.role, content) {
                (Role::Shape, Content::Varint(size)) => self.counts.dimension(size)?,
                (Role::Shape, Content::Bytes(mut packed)) => {
                    while !packed.is_empty() {
                        let size = decode_varint(&mut packed).map_err(malformed)?;
                        self.counts.dimension(size)?;
                    }
                }
                (_, Content::Bytes(inner)) => {
                    if let Encoding::Message(layout) = field.encoding {
                        let depth = depth
                            .checked_sub(1)
                            .ok_or_else(|| malformed("its messages nest too deep"))?;
                        self.read(layout, inner, depth)?;
                    }
                }
                (_, Content::Varint(_) | Content::Fixed) => {}
            }
        }
        // A list grows by doubling.
        let grown = lists.iter().filter(|bytes| **bytes > 0);
        let grown: u64 = grown.map(|bytes| bytes.next_power_of_two()).sum();
        self.counts.decoded_bytes += grown;
        Ok(())
    }
}

/// The content of a field.
enum Content<'m> {
    Varint(u64),
    Fixed,
    Bytes(&'m [u8]),
}

impl<'m> Content<'m> {
    /// How many entries it has in a list of numbers of this wire type: several
    /// when they come packed.
    fn entries(&self, wire_type: WireType) -> u64 {
        let Self::Bytes(packed) = self else {
            return 1;
        };
        let count = match wire_type {
            WireType::SixtyFourBit => packed.len() / 8,
            WireType::ThirtyTwoBit => packed.len() / 4,
            // The last byte of each has no further one behind it.
            _ => packed.iter().filter(|byte| **byte < 0x80).count(),
        };
        count as u64
    }

    fn take(rest: &mut &'m [u8], wire_type: WireType) -> Result<Self, Error> {
        let length = match wire_type {
            WireType::Varint => {
                return decode_varint(rest).map(Self::Varint).map_err(malformed);
            }
            WireType::SixtyFourBit => 8,
            WireType::ThirtyTwoBit => 4,
            WireType::LengthDelimited => decode_varint(rest).map_err(malformed)?,
            WireType::StartGroup | WireType::EndGroup => {
                return Err(malformed("it has a group, which the protocol does not use"));
            }
        };
        let (content, after) = usize::try_from(length)
            .ok()
            .and_then(|length| rest.split_at_checked(length))
            .ok_or_else(|| malformed("a field is longer than the message"))?;
        *rest = after;
        Ok(match wire_type {
            WireType::LengthDelimited => Self::Bytes(content),
            _ => Self::Fixed,
        })
    }
}

/// The error of bytes that are no protobuf of their method.
pub(crate) fn malformed(reason: impl std::fmt::Display) -> Error {
    Error::invalid(
        "message",
        format!("is not a message of this method: {reason}"),
    )
}

/// What a field is counted as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Input,
    Output,
    /// An entry of any map.
    Parameter,
    Shape,
    /// A text of a rerank.
    Text,
    Other,
}

/// How a field is encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Encoding {
    Scalar(WireType),
    Bytes,
    /// The index of its layout.
    Message(usize),
}

#[derive(Debug, Clone, Copy)]
struct Field {
    tag: u32,
    encoding: Encoding,
    repeated: bool,
    role: Role,
    /// What an entry takes when it is decoded.
    entry_bytes: u64,
}

impl Field {
    /// Whether a decoder takes the field in this form: repeated numbers come
    /// packed or one by one.
    fn accepts(&self, wire_type: WireType) -> bool {
        match self.encoding {
            Encoding::Scalar(own) => {
                wire_type == own || (self.repeated && wire_type == WireType::LengthDelimited)
            }
            Encoding::Bytes | Encoding::Message(_) => wire_type == WireType::LengthDelimited,
        }
    }

    fn slot(&self) -> usize {
        usize::try_from(self.tag).map_or(SLOTS - 1, |tag| tag.min(SLOTS - 1))
    }

    /// What the field becomes: the bytes of its entries in a list, and those of
    /// a copy of its contents. A scalar of its own is a part of its message.
    fn decoded_bytes(&self, content: &Content<'_>) -> (u64, u64) {
        match (self.encoding, content) {
            (Encoding::Scalar(wire_type), content) if self.repeated => {
                let listed = content.entries(wire_type) * self.entry_bytes;
                (listed, listed)
            }
            (Encoding::Bytes, Content::Bytes(bytes)) => {
                let listed = if self.repeated { self.entry_bytes } else { 0 };
                // Elements of a tensor of BYTES have their length before them.
                (listed, bytes.len() as u64 + 4)
            }
            (Encoding::Message(_), _) if self.repeated => (self.entry_bytes, 0),
            _ => (0, 0),
        }
    }
}

/// The fields of the messages that requests have.
#[derive(Debug, Default)]
struct Layouts {
    messages: Vec<Vec<Field>>,
    of_method: HashMap<Method, usize>,
}

/// From the descriptors, so that no field is forgotten here.
static LAYOUTS: LazyLock<Layouts> = LazyLock::new(|| {
    let descriptors = FileDescriptorSet::decode(DESCRIPTORS).unwrap_or_default();
    let mut types = HashMap::new();
    for file in &descriptors.file {
        for message in &file.message_type {
            add_types(&mut types, &format!(".{}", file.package()), message);
        }
    }
    let mut layouts = Layouts::default();
    let mut known = HashMap::new();
    let files = descriptors.file.iter();
    let services = files.flat_map(|file| file.service.iter().map(move |one| (file.package(), one)));
    for (package, service) in services {
        for method in &service.method {
            let path = format!("/{package}.{}/{}", service.name(), method.name());
            if let Some(of) = Method::from_path(&path) {
                let layout = layouts.add(&types, &mut known, method.input_type());
                layouts.of_method.insert(of, layout);
            }
        }
    }
    layouts
});

fn add_types<'d>(
    types: &mut HashMap<String, &'d DescriptorProto>,
    scope: &str,
    message: &'d DescriptorProto,
) {
    let name = format!("{scope}.{}", message.name());
    for nested in &message.nested_type {
        add_types(types, &name, nested);
    }
    types.insert(name, message);
}

impl Layouts {
    fn field(&self, layout: usize, tag: u32) -> Option<Field> {
        let fields = self.messages.get(layout)?;
        fields.iter().find(|field| field.tag == tag).copied()
    }

    /// The layout of a type, and of those within it.
    fn add<'d>(
        &mut self,
        types: &HashMap<String, &'d DescriptorProto>,
        known: &mut HashMap<&'d str, usize>,
        name: &'d str,
    ) -> usize {
        if let Some(layout) = known.get(name) {
            return *layout;
        }
        let layout = self.messages.len();
        self.messages.push(Vec::new());
        known.insert(name, layout);
        let mut fields = Vec::new();
        for field in types.get(name).iter().flat_map(|message| &message.field) {
            let inner = field.type_name();
            let is_map = types
                .get(inner)
                .is_some_and(|message| is_map_entry(message));
            let encoding = match scalar(field.r#type()) {
                Some(wire_type) => Encoding::Scalar(wire_type),
                None if field.r#type() == Type::Message => {
                    Encoding::Message(self.add(types, known, inner))
                }
                None => Encoding::Bytes,
            };
            fields.push(Field {
                tag: u32::try_from(field.number()).unwrap_or_default(),
                encoding,
                repeated: field.label() == Label::Repeated,
                role: role(name, field, is_map),
                entry_bytes: entry_bytes(field.r#type()),
            });
        }
        self.messages[layout] = fields;
        layout
    }
}

fn is_map_entry(message: &DescriptorProto) -> bool {
    let options = message.options.as_ref();
    options.is_some_and(|options| options.map_entry())
}

fn role(message: &str, field: &FieldDescriptorProto, is_map: bool) -> Role {
    match (message, field.name()) {
        _ if is_map => Role::Parameter,
        (".inference.ModelInferRequest", "inputs") => Role::Input,
        (".inference.ModelInferRequest", "outputs") => Role::Output,
        (".inference.ModelInferRequest.InferInputTensor", "shape") => Role::Shape,
        (".tei.v1.RerankRequest", "texts") => Role::Text,
        _ => Role::Other,
    }
}

/// The wire type of a number; None for what has a length.
fn scalar(kind: Type) -> Option<WireType> {
    match kind {
        Type::Double | Type::Fixed64 | Type::Sfixed64 => Some(WireType::SixtyFourBit),
        Type::Float | Type::Fixed32 | Type::Sfixed32 => Some(WireType::ThirtyTwoBit),
        Type::Int64
        | Type::Uint64
        | Type::Int32
        | Type::Uint32
        | Type::Sint32
        | Type::Sint64
        | Type::Bool
        | Type::Enum => Some(WireType::Varint),
        Type::String | Type::Bytes | Type::Message | Type::Group => None,
    }
}

/// What an entry of a list takes when it is decoded.
fn entry_bytes(kind: Type) -> u64 {
    match kind {
        Type::Bool => 1,
        Type::Float
        | Type::Fixed32
        | Type::Sfixed32
        | Type::Int32
        | Type::Uint32
        | Type::Sint32
        | Type::Enum => 4,
        Type::Double
        | Type::Fixed64
        | Type::Sfixed64
        | Type::Int64
        | Type::Uint64
        | Type::Sint64 => 8,
        Type::Bytes => SLICE_BYTES,
        Type::String => STRING_BYTES,
        Type::Message | Type::Group => MESSAGE_BYTES,
    }
}

#[cfg(test)]
mod tests;
