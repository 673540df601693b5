use crate::inference::{InferBatchStatistics, InferStatistics, ModelStatistics, StatisticDuration};

/// Adds one server's statistics of a model to another's.
pub fn add_statistics(sum: &mut ModelStatistics, other: &ModelStatistics) {
    sum.last_inference = sum.last_inference.max(other.last_inference);
    sum.inference_count = sum.inference_count.saturating_add(other.inference_count);
    sum.execution_count = sum.execution_count.saturating_add(other.execution_count);
    if let Some(stages) = &other.inference_stats {
        add_stages(sum.inference_stats.get_or_insert_default(), stages);
    }
    for batch in &other.batch_stats {
        let own = sum.batch_stats.iter_mut();
        match own
            .into_iter()
            .find(|own| own.batch_size == batch.batch_size)
        {
            Some(own) => add_batch(own, batch),
            None => sum.batch_stats.push(*batch),
        }
    }
}

fn add_stages(sum: &mut InferStatistics, other: &InferStatistics) {
    for (sum, other) in [
        (&mut sum.success, other.success),
        (&mut sum.fail, other.fail),
        (&mut sum.queue, other.queue),
        (&mut sum.compute_input, other.compute_input),
        (&mut sum.compute_infer, other.compute_infer),
        (&mut sum.compute_output, other.compute_output),
    ] {
        add(sum, other);
    }
}

fn add_batch(sum: &mut InferBatchStatistics, other: &InferBatchStatistics) {
    add(&mut sum.compute_input, other.compute_input);
    add(&mut sum.compute_infer, other.compute_infer);
    add(&mut sum.compute_output, other.compute_output);
}

fn add(sum: &mut Option<StatisticDuration>, other: Option<StatisticDuration>) {
    if let Some(other) = other {
        let sum = sum.get_or_insert_default();
        sum.count = sum.count.saturating_add(other.count);
        sum.ns = sum.ns.saturating_add(other.ns);
    }
}
