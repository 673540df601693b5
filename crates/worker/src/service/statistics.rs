//! The entry of a model in `ModelStatistics`.

use protocol::inference::{
    InferBatchStatistics, InferStatistics, ModelStatistics, StatisticDuration,
};

use crate::metrics::Total;
use crate::model::ServedModel;

/// The statistics of a model since it was loaded.
pub(super) fn to_message(model: &ServedModel) -> ModelStatistics {
    let statistics = model.metrics.statistics();
    ModelStatistics {
        name: model.name.to_string(),
        version: model.version.to_string(),
        last_inference: statistics.last_inference_ms,
        inference_count: statistics.rows,
        execution_count: statistics.batches,
        inference_stats: Some(InferStatistics {
            success: duration(statistics.success),
            fail: duration(statistics.fail),
            queue: duration(statistics.queue),
            compute_input: duration(statistics.input),
            compute_infer: duration(statistics.compute),
            compute_output: duration(statistics.output),
            ..Default::default()
        }),
        batch_stats: statistics
            .by_batch_rows
            .into_iter()
            .map(|(rows, total)| InferBatchStatistics {
                batch_size: rows,
                compute_infer: duration(total),
                ..Default::default()
            })
            .collect(),
        ..Default::default()
    }
}

fn duration(total: Total) -> Option<StatisticDuration> {
    Some(StatisticDuration {
        count: total.count,
        ns: total.ns,
    })
}
