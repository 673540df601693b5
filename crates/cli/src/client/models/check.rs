//! `andon models check`

use std::path::Path;

use serde::Serialize;
use worker::Description;

use super::super::options::OutputFormat;
use super::super::print;

/// Columns of the terminal that a value may take.
const VALUE_COLUMNS_MAX: usize = 80;

/// What a folder would be served as.
#[derive(Debug, Serialize)]
struct Checked {
    /// Whether it would be served.
    served: bool,
    model_type: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    task: Option<String>,
    settings: Vec<CheckedSetting>,
    problems: Vec<String>,
}

#[derive(Debug, Serialize)]
struct CheckedSetting {
    name: &'static str,
    value: String,
    source: String,
}

impl From<Description> for Checked {
    fn from(description: Description) -> Self {
        let settings = description.settings.iter();
        let problems = description.problems.iter();
        Self {
            served: description.is_served(),
            task: description.task.map(|task| task.to_string()),
            settings: settings
                .map(|setting| CheckedSetting {
                    name: setting.name,
                    value: setting.value.clone(),
                    source: setting.source.clone(),
                })
                .collect(),
            problems: problems.map(ToString::to_string).collect(),
            model_type: description.model_type,
        }
    }
}

/// Checks a folder; an error for one that would be refused, once the reasons are printed.
pub fn check(folder: &Path, format: OutputFormat) -> anyhow::Result<()> {
    let description = worker::check_folder(folder).map_err(anyhow::Error::msg)?;
    let checked = Checked::from(description);
    match format {
        OutputFormat::Json => print::json(&checked)?,
        OutputFormat::Table => print::out(&text(&checked))?,
    }
    match checked.problems.len() {
        0 => Ok(()),
        1 => anyhow::bail!("the folder would be refused for the problem above"),
        count => anyhow::bail!("the folder would be refused for the {count} problems above"),
    }
}

fn text(checked: &Checked) -> String {
    let mut text = match (&checked.task, checked.served) {
        (Some(task), true) => format!(
            "served for the task {task}, model_type {}\n",
            print::visible(&checked.model_type)
        ),
        _ => "not served\n".to_owned(),
    };
    if !checked.settings.is_empty() {
        let settings = checked.settings.iter();
        let rows: Vec<Vec<String>> = settings
            .map(|setting| {
                let value = print::short(&setting.value, VALUE_COLUMNS_MAX);
                vec![setting.name.to_owned(), value, setting.source.clone()]
            })
            .collect();
        text.push('\n');
        text.push_str(&print::table(&["SETTING", "VALUE", "FROM"], &rows));
    }
    if !checked.problems.is_empty() {
        let problems = checked.problems.iter();
        let rows: Vec<Vec<String>> = problems.map(|problem| vec![problem.clone()]).collect();
        text.push('\n');
        text.push_str(&print::table(&["PROBLEM"], &rows));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn golden(name: &str) -> Checked {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden");
        Checked::from(worker::check_folder(&folder.join(name)).unwrap())
    }

    #[test]
    fn a_folder_that_is_served_is_shown_with_the_source_of_each_setting() {
        let checked = golden("bert-dense");
        assert!(checked.served);
        let text = text(&checked);
        assert!(
            text.starts_with("served for the task embedding, model_type bert"),
            "{text}"
        );
        let line = |name: &str| {
            let mut lines = text.lines();
            lines
                .find(|line| line.starts_with(name))
                .unwrap()
                .to_owned()
        };
        assert!(line("pooling").ends_with("1_Pooling/config.json"), "{text}");
        assert!(line("tokens_max").contains("60"), "{text}");
        assert!(
            line("tokens_max").ends_with("sentence_bert_config.json"),
            "{text}"
        );
        assert!(line("dense").contains("32 to 12"), "{text}");
    }

    #[test]
    fn a_folder_that_is_refused_is_an_error() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let error = check(&folder, OutputFormat::Json).unwrap_err();
        assert!(error.to_string().contains("refused"), "{error}");
        let checked = Checked::from(worker::check_folder(&folder).unwrap());
        assert!(!checked.served && checked.problems[0].starts_with("config.json: is missing"));
        assert!(text(&checked).contains("PROBLEM"), "{}", text(&checked));
    }
}
