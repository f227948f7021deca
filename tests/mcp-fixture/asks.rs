//! What has to ask its client before it can answer: by a result that the client comes back with, or, with a session, by a request
//! of its own.
//!
//! ```text
//!  call ──> round 0 asked for ──> call with answers ──> all there? ── yes ──> round 1, or done
//!                  ^                                        │ no
//!                  └────────────────────────────────────────┘
//! ```
//!
//! Invariant: what a client sends back only identifies its call. As nido's own, it is a number that the server knows,
//! valid for one use; any other is refused.

#![allow(deprecated, reason = "the suite wants sampling and roots, which the protocol is giving up")]

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use nido_files::random::id as random_id;
use rmcp::RoleServer;
use rmcp::model::{
    ClientCapabilities, CreateMessageRequestParams, CreateMessageResult, ElicitRequestParams, ElicitResult,
    ElicitationAction, ErrorData, InputRequiredResult, InputResponses, ListRootsResult,
};
use rmcp::service::RequestContext;
use serde::Deserialize as _;
use serde_json::{Map, Value, json};

use crate::server::{Server, of_json};

/// How long a client with a session may take to answer.
const REPLY_TIMEOUT: Duration = Duration::from_secs(20);

/// What is requested at once: by their keys, requests as the protocol has them.
type Round = BTreeMap<&'static str, Value>;

/// All that is requested, one after the other.
pub struct Rounds {
    rounds: Vec<Round>,
    /// Whether the client is given something to bring back.
    stateful: bool,
    /// Requests that the client does not support are left out. Otherwise the call is refused.
    as_it_can: bool,
}

/// What a client comes back with.
pub struct Retry {
    pub answers: Option<InputResponses>,
    pub state: Option<String>,
}

/// Where a call is.
pub enum CallStage {
    /// The client has to come back.
    Again(Box<InputRequiredResult>),
    /// All is there; what it is, in words.
    Done(String),
}

/// Which calls are waited for: of what, and at which round.
#[derive(Default)]
pub struct States(Mutex<HashMap<String, (String, usize)>>);

impl States {
    fn keep(&self, name: &str, round: usize) -> Result<String, ErrorData> {
        let id = random_id().map_err(|e| ErrorData::internal_error(e.to_string(), None))?;
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(id.clone(), (name.into(), round));
        Ok(id)
    }

    fn take(&self, name: &str, id: &str) -> Result<usize, ErrorData> {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(id);
        let round = known.filter(|(of, _)| of == name).map(|(_, round)| round);
        round.ok_or_else(|| ErrorData::invalid_params("requestState is not one that was given", None))
    }
}

/// What this tool or prompt asks for, if it does.
pub fn rounds(name: &str) -> Option<Rounds> {
    let form = |message: &str, field: &str, kind: &str| {
        let schema = json!({ "type": "object", "properties": { field: { "type": kind } }, "required": [field] });
        json!({ "method": "elicitation/create", "params": { "message": message, "requestedSchema": schema } })
    };
    let sampling = |words: &str| json!({ "method": "sampling/createMessage", "params": sampling(words) });
    let roots = || json!({ "method": "roots/list", "params": {} });
    let who = || form("What is your name?", "name", "string");
    let one = |key, request| vec![Round::from([(key, request)])];
    let (rounds, stateful) = match name {
        "test_input_required_result_elicitation" | "test_streaming_elicitation" => (one("user_name", who()), false),
        "test_input_required_result_sampling" => {
            (one("capital_question", sampling("What is the capital of France?")), false)
        }
        "test_missing_capability" => (one("words", sampling("Say hello.")), false),
        "test_input_required_result_list_roots" => (one("client_roots", roots()), false),
        "test_input_required_result_request_state" | "test_input_required_result_tampered_state" => {
            (one("confirm", form("Shall it be?", "ok", "boolean")), true)
        }
        "test_input_required_result_multiple_inputs" => {
            let greeting = sampling("Greet somebody.");
            (vec![Round::from([("user_name", who()), ("greeting", greeting), ("client_roots", roots())])], true)
        }
        "test_input_required_result_multi_round" => {
            let colour = form("VmRef colour do you like?", "color", "string");
            (vec![Round::from([("step1", who())]), Round::from([("step2", colour)])], true)
        }
        "test_input_required_result_capabilities" => {
            (vec![Round::from([("user_name", who()), ("greeting", sampling("Greet somebody."))])], false)
        }
        "test_input_required_result_prompt" => {
            (one("user_context", form("What is it about?", "context", "string")), false)
        }
        _ => return None,
    };
    Some(Rounds { rounds, stateful, as_it_can: name.ends_with("_capabilities") })
}

/// Continues a call as far as the client's replies allow.
pub fn continue_call(
    server: &Server,
    name: &str,
    rounds: &Rounds,
    retry: Retry,
    context: &RequestContext<RoleServer>,
) -> Result<CallStage, ErrorData> {
    let states = &server.fixture.states;
    let (mut at, begun) = match &retry.state {
        Some(id) if rounds.stateful => (states.take(name, id)?, true),
        _ => (0, !rounds.stateful),
    };
    let can = context.client_capabilities().unwrap_or_default();
    let answers = retry.answers.unwrap_or_default();
    let asked = askable(&rounds.rounds[at], &can, rounds.as_it_can)?;
    let answered = |(key, request): (&&str, &Value)| answers.get(*key).is_some_and(|answer| is_answer(request, answer));
    if begun && asked.iter().all(answered) {
        at += 1;
    }
    let Some(round) = rounds.rounds.get(at) else {
        let state = if rounds.stateful { "state-ok " } else { "" };
        let said: BTreeMap<_, _> = asked.keys().map(|key| (key, &answers[*key])).collect();
        return Ok(CallStage::Done(format!("{state}{}", json!(said))));
    };
    let requests = of_json(json!(askable(round, &can, rounds.as_it_can)?))?;
    let state = rounds.stateful.then(|| states.keep(name, at)).transpose()?;
    Ok(CallStage::Again(Box::new(InputRequiredResult::new(Some(requests), state))))
}

/// The requests of a round that this client supports.
fn askable(round: &Round, can: &ClientCapabilities, as_it_can: bool) -> Result<Round, ErrorData> {
    let can = json!(can);
    let needs =
        |request: &Value| request["method"].as_str().and_then(|method| method.split('/').next()).map(str::to_owned);
    let missing = round.values().filter_map(needs).filter(|needed| can.get(needed).is_none());
    let missing: Map<String, Value> = missing.map(|needed| (needed, json!({}))).collect();
    let asked: Round = round
        .iter()
        .filter(|(_, request)| needs(request).is_some_and(|needed| !missing.contains_key(&needed)))
        .map(|(key, request)| (*key, request.clone()))
        .collect();
    if asked.is_empty() || !(as_it_can || missing.is_empty()) {
        return Err(ErrorData::missing_required_client_capability(of_json(missing.into())?));
    }
    Ok(asked)
}

/// Whether this answers that request.
fn is_answer(request: &Value, answer: &Value) -> bool {
    match request["method"].as_str() {
        Some("elicitation/create") => ElicitResult::deserialize(answer).is_ok_and(|answer| {
            let fields = request["params"]["requestedSchema"]["required"].as_array();
            let has = |field: &Value| {
                answer.content.as_ref().is_some_and(|content| content.get(field.as_str().unwrap_or_default()).is_some())
            };
            answer.action == ElicitationAction::Accept && fields.is_some_and(|fields| fields.iter().all(has))
        }),
        Some("sampling/createMessage") => CreateMessageResult::deserialize(answer).is_ok(),
        _ => ListRootsResult::deserialize(answer).is_ok(),
    }
}

fn sampling(words: &str) -> Value {
    json!({ "messages": [{ "role": "user", "content": { "type": "text", "text": words } }], "maxTokens": 100 })
}

/// Requests that a client with a session fills in a form; returns its reply as text.
pub async fn elicit(context: &RequestContext<RoleServer>, message: &str, schema: Value) -> Result<String, ErrorData> {
    let form: ElicitRequestParams = of_json(json!({ "mode": "form", "message": message, "requestedSchema": schema }))?;
    let answer = context.peer.create_elicitation_with_timeout(form, Some(REPLY_TIMEOUT)).await;
    let answer = answer.map_err(|e| ErrorData::internal_error(format!("the client was not asked: {e}"), None))?;
    Ok(json!(answer).to_string())
}

/// Asks a client with a session for words of its model.
pub async fn sample(context: &RequestContext<RoleServer>, words: &str) -> Result<String, ErrorData> {
    let request: CreateMessageRequestParams = of_json(sampling(words))?;
    let answer = tokio::time::timeout(REPLY_TIMEOUT, context.peer.create_message(request)).await;
    let answer = answer.map_err(|_| ErrorData::internal_error("the client does not answer", None))?;
    let answer = answer.map_err(|e| ErrorData::internal_error(format!("the client was not asked: {e}"), None))?;
    Ok(json!(answer).to_string())
}
