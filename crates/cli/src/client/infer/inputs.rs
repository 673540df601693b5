//! The input tensors of a request, from the command line and files, by the
//! model's metadata.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, anyhow, bail, ensure};
use bytes::Bytes;
use protocol::inference::model_infer_request::InferInputTensor;
use protocol::inference::model_metadata_response::TensorMetadata;
use protocol::{LENGTHS_INPUT, is_optional_input};
use tensor::{Datatype, Shape, Tensor};

use super::super::print::shape;
use super::elements::{Elements, encode};
use super::{json, npy};

/// The most bytes of a file or of standard input.
const SOURCE_BYTES_MAX: u64 = 1 << 30;

/// One input of the request.
#[derive(Debug)]
pub struct InputTensor {
    /// The input's name.
    pub name: String,
    /// Its contents.
    pub tensor: Tensor,
}

impl InputTensor {
    /// The input as messages have it, and its raw contents.
    pub fn into_wire(self) -> (InferInputTensor, Bytes) {
        let input = InferInputTensor {
            name: self.name,
            datatype: self.tensor.datatype().name().to_owned(),
            shape: self.tensor.shape().to_wire(),
            ..Default::default()
        };
        (input, self.tensor.into_raw())
    }
}

/// An input of the model and its values on the command line.
struct InputValues<'a> {
    input: &'a TensorMetadata,
    /// The values of `--input`.
    values: Vec<&'a str>,
    /// The positional texts, which are never the name of a file.
    texts: &'a [String],
}

/// A tensor for each input of the model.
pub fn tensors(
    inputs: &[TensorMetadata],
    named: &[(String, String)],
    texts: &[String],
) -> anyhow::Result<Vec<InputTensor>> {
    for (name, _) in named {
        ensure!(
            inputs.iter().any(|input| input.name == *name),
            "the model has no input '{name}'\n  Its inputs: {}",
            listed(inputs)
        );
    }
    let mut given: Vec<InputValues> = chosen(inputs, named)
        .map(|input| InputValues {
            input,
            values: named
                .iter()
                .filter(|(name, _)| *name == input.name)
                .map(|(_, value)| value.as_str())
                .collect(),
            texts: &[],
        })
        .collect();
    if !texts.is_empty() {
        let mut free = given
            .iter_mut()
            .filter(|given| given.values.is_empty() && given.input.datatype == "BYTES");
        match (free.next(), free.next()) {
            (Some(only), None) => only.texts = texts,
            (None, _) => bail!(
                "the model has no text input without a value for the texts\n  Its inputs: {}",
                listed(inputs)
            ),
            (Some(one), Some(_)) => bail!(
                "several inputs take texts: give all but one by name, for example --input {}=TEXT\n  Its inputs: {}",
                one.input.name,
                listed(inputs)
            ),
        }
    }
    let mut tensors = given
        .iter()
        .map(|given| input_tensor(given, inputs))
        .collect::<anyhow::Result<Vec<InputTensor>>>()?;
    repeat_single(&mut tensors, &given)?;
    Ok(tensors)
}

/// The inputs that the request has: token ids where they are given by name, in
/// place of the others.
fn chosen<'i>(
    inputs: &'i [TensorMetadata],
    named: &[(String, String)],
) -> impl Iterator<Item = &'i TensorMetadata> {
    let takes_ids = inputs.iter().any(|input| input.name == LENGTHS_INPUT);
    let with_ids = named.iter().any(|(name, _)| is_optional_input(name));
    inputs
        .iter()
        .filter(move |input| !takes_ids || is_optional_input(&input.name) == with_ids)
}

fn input_tensor(given: &InputValues, inputs: &[TensorMetadata]) -> anyhow::Result<InputTensor> {
    let input = given.input;
    let name = &input.name;
    let datatype: Datatype = input.datatype.parse().with_context(|| {
        format!(
            "the server reports datatype {} for input '{name}'",
            input.datatype
        )
    })?;
    let tensor = if !given.texts.is_empty() {
        texts_tensor(given.texts, input)
    } else if let [value] = given.values[..] {
        one_value(value, datatype, input)
    } else if given.values.is_empty() {
        let hint = if datatype == Datatype::Bytes {
            "TEXT"
        } else {
            "@FILE"
        };
        Err(anyhow!(
            "no value: add --input {name}={hint}\n  The model's inputs: {}",
            listed(inputs)
        ))
    } else if datatype == Datatype::Bytes {
        let texts: Vec<Bytes> = given
            .values
            .iter()
            .map(|text| text.as_bytes().to_vec().into())
            .collect();
        lines_tensor(&texts, input)
    } else {
        Err(anyhow!("only text inputs take several values"))
    };
    Ok(InputTensor {
        name: name.clone(),
        tensor: tensor.with_context(|| format!("input '{name}'"))?,
    })
}

/// The positional texts; `-` means the lines of standard input.
fn texts_tensor(texts: &[String], input: &TensorMetadata) -> anyhow::Result<Tensor> {
    let mut elements = Vec::with_capacity(texts.len());
    for text in texts {
        if text == "-" {
            elements.extend(lines(&standard_input()?)?);
        } else {
            elements.push(text.clone().into());
        }
    }
    lines_tensor(&elements, input)
}

/// `@FILE`, `-`, or the value itself.
fn one_value(value: &str, datatype: Datatype, input: &TensorMetadata) -> anyhow::Result<Tensor> {
    let text = datatype == Datatype::Bytes;
    if let Some(path) = value.strip_prefix('@') {
        return file(Path::new(path), datatype, input).with_context(|| format!("file {path}"));
    }
    match value {
        "-" if text => lines_tensor(&lines(&standard_input()?)?, input),
        "-" => json_tensor(&standard_input()?, datatype, input).context("standard input"),
        value if text => lines_tensor(&[Bytes::from(value.to_owned())], input),
        value => json_tensor(value.as_bytes(), datatype, input)
            .context("must be JSON, for example [[0, 1, 2]], or @FILE"),
    }
}

fn file(path: &Path, datatype: Datatype, input: &TensorMetadata) -> anyhow::Result<Tensor> {
    let extension = path.extension().and_then(|extension| extension.to_str());
    let kind = extension.unwrap_or_default().to_ascii_lowercase();
    ensure!(
        matches!(kind.as_str(), "json" | "npy" | "txt"),
        "the file name must end in .json, .npy or .txt"
    );
    let contents = read(File::open(path)?)?;
    match kind.as_str() {
        "json" => json_tensor(&contents, datatype, input),
        "npy" => {
            let array = npy::parse(&contents)?;
            if array.datatype() == datatype {
                let sizes = array.shape().to_wire();
                return fitted(datatype, sizes, array.into_raw(), input);
            }
            let elements = Elements::new(&array);
            let values = (0..array.shape().elements()).map(|index| elements.at(index));
            let raw = encode(datatype, values)?;
            fitted(datatype, array.shape().to_wire(), raw.into(), input)
        }
        _ if datatype != Datatype::Bytes => Err(anyhow!(
            "a .txt file holds strings, but the input's datatype is {datatype}"
        )),
        _ => lines_tensor(&lines(&contents)?, input),
    }
}

fn json_tensor(text: &[u8], datatype: Datatype, input: &TensorMetadata) -> anyhow::Result<Tensor> {
    let array = json::parse(text)?;
    let raw = encode(datatype, array.values.into_iter())?;
    fitted(datatype, array.shape, raw.into(), input)
}

fn lines_tensor(texts: &[Bytes], input: &TensorMetadata) -> anyhow::Result<Tensor> {
    let raw = tensor::encode_bytes_elements(texts)?;
    let mut sizes = vec![i64::try_from(texts.len())?];
    // A text per row, where rows have a second dimension of one.
    if input.shape.len() == 2 {
        sizes.push(1);
    }
    fitted(Datatype::Bytes, sizes, raw.into(), input)
}

/// A tensor of these bytes. A single row without a batch dimension gets one;
/// all else is for the server to check.
fn fitted(
    datatype: Datatype,
    mut sizes: Vec<i64>,
    raw: Bytes,
    input: &TensorMetadata,
) -> anyhow::Result<Tensor> {
    if sizes.len() + 1 == input.shape.len() && input.shape.first() == Some(&-1) {
        sizes.insert(0, 1);
    }
    Ok(Tensor::from_raw(datatype, Shape::checked(&sizes)?, raw)?)
}

/// A single text is repeated for each row of the other inputs: one query and
/// the texts to rank by it.
fn repeat_single(tensors: &mut [InputTensor], given: &[InputValues]) -> anyhow::Result<()> {
    let rows = |input: &InputTensor| input.tensor.shape().sizes().first().copied().unwrap_or(1);
    let rows_max = tensors.iter().map(rows).max().unwrap_or(1);
    for (input, given) in tensors.iter_mut().zip(given) {
        let single = input.tensor.datatype() == Datatype::Bytes
            && given.texts.len() + given.values.len() == 1;
        if !single || rows(input) != 1 || rows_max == 1 || given.input.shape != [-1] {
            continue;
        }
        if let [text] = input.tensor.to_elements()?[..] {
            let texts = vec![text; rows_max];
            input.tensor = Tensor::from_elements(Shape::from_sizes(vec![rows_max])?, &texts)?;
        }
    }
    Ok(())
}

fn standard_input() -> anyhow::Result<Bytes> {
    read(std::io::stdin().lock()).context("standard input")
}

fn read(source: impl Read) -> anyhow::Result<Bytes> {
    let mut contents = Vec::new();
    source
        .take(SOURCE_BYTES_MAX + 1)
        .read_to_end(&mut contents)?;
    ensure!(
        contents.len() as u64 <= SOURCE_BYTES_MAX,
        "longer than {} MiB",
        SOURCE_BYTES_MAX >> 20
    );
    Ok(contents.into())
}

/// A text per line.
fn lines(contents: &Bytes) -> anyhow::Result<Vec<Bytes>> {
    let text = std::str::from_utf8(contents).context("not UTF-8")?;
    Ok(text
        .lines()
        .map(|line| contents.slice_ref(line.as_bytes()))
        .collect())
}

fn listed(inputs: &[TensorMetadata]) -> String {
    let inputs: Vec<String> = inputs
        .iter()
        .map(|input| format!("{} {} {}", input.name, input.datatype, shape(&input.shape)))
        .collect();
    inputs.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn input(name: &str, datatype: &str, shape: &[i64]) -> TensorMetadata {
        TensorMetadata {
            name: name.into(),
            datatype: datatype.into(),
            shape: shape.to_vec(),
        }
    }

    fn named(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs
            .iter()
            .map(|(name, value)| ((*name).into(), (*value).into()))
            .collect()
    }

    fn texts(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|text| (*text).into()).collect()
    }

    #[test]
    fn texts_go_to_the_text_input() {
        let inputs = [input("text", "BYTES", &[-1])];
        let tensors = tensors(&inputs, &[], &texts(&["one", "@two"])).unwrap();
        let tensor = &tensors[0].tensor;
        assert_eq!(tensor.to_elements().unwrap(), [&b"one"[..], b"@two"]);
    }

    #[test]
    fn one_query_stands_beside_every_text() {
        let inputs = [
            input("query", "BYTES", &[-1]),
            input("text", "BYTES", &[-1]),
        ];
        let both = tensors(&inputs, &named(&[("query", "q")]), &texts(&["a", "b"])).unwrap();
        assert_eq!(both[0].tensor.to_elements().unwrap(), [b"q", b"q"]);
        assert!(tensors(&inputs, &[], &texts(&["a"])).is_err());
    }

    #[test]
    fn one_row_of_numbers_gets_its_batch_dimension() {
        let inputs = [input("pixels", "FP32", &[-1, 3])];
        let tensors = tensors(&inputs, &named(&[("pixels", "[0, 1.5, 16]")]), &[]).unwrap();
        assert_eq!(tensors[0].tensor.shape().sizes(), [1, 3]);
        assert_eq!(tensors[0].tensor.to_f32().unwrap(), [0.0, 1.5, 16.0]);
    }

    #[test]
    fn errors_say_what_to_give() {
        let inputs = [input("pixels", "FP32", &[-1, 3])];
        let error = |named: &[(String, String)], texts: &[String]| {
            format!("{:#}", tensors(&inputs, named, texts).unwrap_err())
        };
        assert!(error(&[], &[]).contains("--input pixels=@FILE"));
        assert!(error(&[], &texts(&["a"])).contains("pixels FP32 [-1,3]"));
        assert!(error(&named(&[("pixel", "1")]), &[]).contains("no input 'pixel'"));
        assert!(error(&named(&[("pixels", "abc")]), &[]).contains("[[0, 1, 2]]"));
        assert!(error(&named(&[("pixels", "@a.csv")]), &[]).contains(".npy"));
        assert!(error(&named(&[("pixels", "[\"a\"]")]), &[]).contains("element 0"));
    }
}
