//! Jobs: calls that lasted longer than a client waits, and what became of them.

use std::time::Duration;

use nido_api::error::{Code, Error, Result};
use nido_api::{Job, JobState, Scope, Viewer};
use serde::Deserialize;
use tokio::time::Instant;

use super::{DESTROYS, LOOKS, Tool, arguments};
use crate::answer::ToolResult;
use crate::call_context::CallContext;
use crate::schema;

/// How long a caller may wait for a job, in milliseconds: clients give up a little later.
const WAIT_MAX: u64 = 30_000;
/// How often a job is looked at while somebody waits for it.
const LOOK_EVERY: Duration = Duration::from_millis(250);

pub const GET: Tool = Tool {
    name: "job_get",
    title: "Tell about a job",
    about: "Tells how a job stands that another tool has answered with status running and a job_id: running, done with the \
        result that the tool would have answered, failed with its error, cancelled, or lost because the server ended. With \
        wait_seconds it waits for the end first, which is better than asking again and again. Changes nothing.",
    hints: LOOKS,
    scope: Scope::Read,
    takes: schema::arguments::<Get>,
    gives: schema::answer::<Job>,
    run: |call, given| Box::pin(async move { get(&call, arguments(given)?).await }),
};

/// Which job.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
struct Get {
    /// The job_id of the answer that began it.
    job_id: String,
    /// Wait for its end at most so many milliseconds; 0 if absent.
    #[serde(default)]
    #[schema(minimum = 0, maximum = 30_000)]
    wait_ms: u64,
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
            return ToolResult::new(&job);
        }
        let pause = tokio::time::sleep_until(deadline.min(Instant::now() + LOOK_EVERY));
        call.unless_cancelled(async {
            pause.await;
            Ok(())
        })
        .await?;
    }
}

pub const CANCEL: Tool = Tool {
    name: "job_cancel",
    title: "Cancel a job",
    about: "Asks that a job be cancelled: a command is killed, a copy is given up, a VM or template that is being made is \
        removed, within seconds. What stops, deletes, takes a snapshot or goes back to one cannot be broken off: it goes to its \
        end, and the job is done then. Use it when the result is not wanted any more. A job that has ended stays as it is. The \
        answer is the job as it stands at that moment. Next: job_get tells how it has ended.",
    hints: DESTROYS,
    scope: Scope::Run,
    takes: schema::arguments::<Cancel>,
    gives: schema::answer::<Job>,
    run: |call, given| {
        Box::pin(async move {
            let Cancel { job_id } = arguments(given)?;
            ToolResult::new(&call.nido().await?.job_cancel(&job_id, Viewer::Actor(&call.who.actor))?)
        })
    },
};

/// Which job.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
struct Cancel {
    /// The job_id of the answer that began it.
    job_id: String,
}
