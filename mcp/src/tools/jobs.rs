//! Jobs: calls that lasted longer than a client waits, and what became of them.

use std::time::Duration;

use futures::future::BoxFuture;
use nido_api::error::{Code, Error, Result};
use nido_api::operation as op;
use nido_api::{FrontEnd, JOB_RESULT_MAX, Job, JobState, Viewer};
use serde::Deserialize;
use tokio::time::Instant;

use super::{Operation, REPEATABLE, Tool, parse};
use crate::answer::ToolResult;
use crate::call_context::CallContext;
use crate::schema;

/// How long a caller may wait for a job, in milliseconds: clients give up a little later.
const WAIT_MAX: u64 = 30_000;
/// How often a job is polled while a caller waits for it.
const POLL_INTERVAL: Duration = Duration::from_millis(250);

pub const GET: Tool = Tool {
    op: op::JOB_GET,
    title: "Get a job",
    about: "Returns a job of another tool: state, result or error. Set wait_seconds to wait for its end.",
    hints: REPEATABLE,
    takes: schema::arguments::<Get>,
    unlisted: &[],
    gives: schema::result::<Job>,
    parse: parse::<Get>,
};

/// Which job.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
struct Get {
    job_id: String,
    /// At most 30 seconds.
    #[serde(default)]
    #[schema(minimum = 0, maximum = 30_000)]
    wait_ms: u64,
}

impl Operation for Get {
    fn run(self: Box<Self>, call: CallContext) -> BoxFuture<'static, Result<ToolResult>> {
        Box::pin(async move { get(&call, *self).await })
    }
}

async fn get(call: &CallContext, asked: Get) -> Result<ToolResult> {
    if asked.wait_ms > WAIT_MAX {
        return Err(Error::new(Code::SpecInvalid, format!("wait_ms: it is at most {WAIT_MAX}")));
    }
    let nido = call.nido().await?;
    let deadline = Instant::now() + Duration::from_millis(asked.wait_ms);
    loop {
        let job = nido.job_get(&asked.job_id, Viewer::Actor(&call.who.actor))?;
        if job.state != JobState::Running || Instant::now() >= deadline {
            return shown(job.shown_to(call.scope).worded_for(FrontEnd::Mcp));
        }
        let pause = tokio::time::sleep_until(deadline.min(Instant::now() + POLL_INTERVAL));
        call.unless_cancelled(async {
            pause.await;
            Ok(())
        })
        .await?;
    }
}

/// A job of the REST API may have a longer result than a tool returns.
fn shown(mut job: Job) -> Result<ToolResult> {
    let bytes = job.result.as_ref().map_or(0, |result| result.to_string().len());
    if bytes <= JOB_RESULT_MAX {
        return ToolResult::new(&job);
    }
    job.result = None;
    let route = op::OPERATION_INFO.call(FrontEnd::Api).unwrap_or_default();
    let note = format!("the result has {bytes} bytes, more than a tool returns; the REST API has it: {route}");
    Ok(ToolResult::new(&job)?.noted(&[note]))
}

pub const CANCEL: Tool = Tool {
    op: op::JOB_CANCEL,
    title: "Cancel a job",
    about: "Cancels a job. Stops, deletions and snapshots complete anyway.",
    hints: REPEATABLE,
    takes: schema::arguments::<Cancel>,
    unlisted: &[],
    gives: schema::result::<Job>,
    parse: parse::<Cancel>,
};

/// Which job.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
struct Cancel {
    job_id: String,
}

impl Operation for Cancel {
    fn run(self: Box<Self>, call: CallContext) -> BoxFuture<'static, Result<ToolResult>> {
        Box::pin(async move {
            let job = call.nido().await?.job_cancel(&self.job_id, Viewer::Actor(&call.who.actor))?;
            shown(job.shown_to(call.scope).worded_for(FrontEnd::Mcp))
        })
    }
}
