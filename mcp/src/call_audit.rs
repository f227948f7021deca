//! The audit log's record of tool calls: their request, and their outcome.

use nido_api::error::{Error, Result};
use nido_core::execute::{Request, Verdict};
use serde_json::Value;

use crate::answer::ToolResult;
use crate::call_context::CallContext;
use crate::tools::Tool;

/// The request of a call.
pub fn request(call: &CallContext, tool: &Tool, arguments: Value) -> Request {
    Request { operation: tool.op, caller: call.who.clone(), arguments }
}

/// The outcome of a call; `word` is how it was approved, or why no approval was needed.
pub fn verdict(call: &CallContext, outcome: &Result<&ToolResult, &Error>, word: &str) -> Verdict {
    match outcome {
        Ok(result) => {
            let words = [word, result.word.as_str()].into_iter().filter(|word| !word.is_empty());
            Verdict::success(words.collect::<Vec<_>>().join(","))
        }
        Err(error) => {
            let known = call.notes().reason;
            let verdict = Verdict::failure(error);
            Verdict { reason: known.map_or(verdict.reason, str::to_owned), ..verdict }
        }
    }
}
