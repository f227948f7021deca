//! A person's word before something is destroyed.
//!
//! ```text
//!  policy says never, or it is the caller's own throw-away VM ───────────────────────────> go, and written down
//!  approval_id, or the answer to what was asked ──> used up ──────────────────────────────> go
//!  else an approval is asked for:
//!    a client without `initialize` that shows forms ──> input_required, with the approval's id as state
//!    one with `initialize` that shows forms ──> elicitation/create ──> used up ───────────> go
//!    any other ──> approval_required: the user runs `nido approve ID`, the model calls again with approval_id
//! ```
//!
//! An approval is bound to the VM's id, the caller, the tool and a digest of the arguments; it is good for two minutes and for
//! one use. Invariant: what a model can fill in by itself never counts as consent.

use std::collections::BTreeMap;
use std::sync::Arc;

use nido_vmm::api::{APPROVAL_LIFETIME, Approval, ApprovalState, Ask};
use nido_vmm::error::{Code, Error, Result};
use nido_vmm::name::VmName;
use nido_vmm::policy::Confirm;
use rmcp::RoleServer;
use rmcp::model::{
    BooleanSchema, ClientCapabilities, ElicitRequest, ElicitRequestParams, ElicitResult, ElicitationAction,
    ElicitationSchema, InputRequest, InputRequiredResult, InputResponses, ProtocolVersion,
};
use rmcp::service::RequestContext;
use serde_json::Value;

use crate::call::Call;
use crate::tools::Tool;

/// What the form's one field is called, and the request for it.
const FIELD: &str = "confirm";

/// What a retry of a client without sessions brings along.
#[derive(Debug, Default)]
pub struct Retry {
    pub answers: Option<InputResponses>,
    pub state: Option<String>,
}

/// What is decided.
#[derive(Debug)]
pub enum Word {
    /// Go on; the word is for the audit log.
    Go(&'static str),
    /// Ask the user first.
    Ask(Box<InputRequiredResult>),
}

/// Whether it may be done now.
pub async fn confirm(
    call: &Call,
    tool: &Tool,
    arguments: &Value,
    retry: Retry,
    context: &RequestContext<RoleServer>,
) -> Result<Word> {
    if !tool.confirmed {
        return Ok(Word::Go(""));
    }
    if call.app.settings().policy.confirm == Confirm::Never {
        return Ok(Word::Go("confirm_never"));
    }
    let name = arguments.get("name").and_then(Value::as_str).and_then(|name| name.parse::<VmName>().ok());
    let nido = call.nido().await?;
    // A name that is none, or nobody's, is told by the tool itself; nothing can be destroyed then.
    let Some(vm) = (match name {
        Some(name) => nido.info(&name).await.ok(),
        None => None,
    }) else {
        return Ok(Word::Go(""));
    };
    if vm.ephemeral && call.app.made(&call.who.actor, &vm.id) {
        return Ok(Word::Go("own_ephemeral"));
    }
    let ask = Ask {
        tool: tool.name.into(),
        vm_id: vm.id,
        vm_name: vm.name,
        actor: call.who.actor.clone(),
        agent: call.who.agent.clone(),
        arguments: arguments.clone(),
    };
    if let Some(id) = arguments.get("approval_id").and_then(Value::as_str) {
        use_up(call, id, &ask)?;
        return Ok(Word::Go("approved"));
    }
    if let (Some(answers), Some(id)) = (&retry.answers, &retry.state) {
        return answered(call, id, &ask, answers).await;
    }
    let approval = nido.approval_ask(&ask)?;
    match approval.state {
        ApprovalState::Pending => {}
        // The user was quicker than the model.
        _ => {
            use_up(call, &approval.id, &ask)?;
            return Ok(Word::Go("approved"));
        }
    }
    let words = question(tool, &ask);
    let shows_forms = context.client_capabilities().is_some_and(|client| shows_forms(&client));
    match (shows_forms, is_modern(context)) {
        (true, true) => Ok(Word::Ask(Box::new(form_result(&words, &approval)?))),
        (true, false) => elicited(call, context, &words, &approval, &ask).await,
        (false, _) => Err(by_hand(call, &approval, &ask)),
    }
}

/// Whether a request stands for itself, in the protocol without `initialize`.
pub fn is_modern(context: &RequestContext<RoleServer>) -> bool {
    context.protocol_version().is_some_and(|version| version.as_str() >= ProtocolVersion::V_2026_07_28.as_str())
}

/// What a person is asked. Names are parsed names, so nothing of a guest is in it.
fn question(tool: &Tool, ask: &Ask) -> String {
    let agent = ask.agent.as_deref().map_or_else(|| "An agent".into(), crate::answer::plain);
    let what = match tool.name {
        "vm_restore" => "take back to a snapshot, losing what it has done since,",
        _ => "delete, with its disk and its snapshots,",
    };
    format!("{agent} wants to {what} the VM '{}' (id {}). This cannot be undone.", ask.vm_name, ask.vm_id)
}

fn shows_forms(client: &ClientCapabilities) -> bool {
    // One that says nothing about the kind means forms.
    client.elicitation.as_ref().is_some_and(|can| can.form.is_some() || can.url.is_none())
}

fn form(words: &str) -> Result<ElicitRequestParams> {
    let field = BooleanSchema::new().title("Yes, do it").description("Without a yes, nothing is done");
    let schema = ElicitationSchema::builder().required_bool_property(FIELD, |_| field).build();
    let requested_schema = schema.map_err(|e| Error::internal(format!("the form cannot be made: {e}")))?;
    Ok(ElicitRequestParams::FormElicitationParams { meta: None, message: words.into(), requested_schema })
}

fn form_result(words: &str, approval: &Approval) -> Result<InputRequiredResult> {
    let request = InputRequest::Elicitation(ElicitRequest::new(form(words)?));
    Ok(InputRequiredResult::new(Some(BTreeMap::from([(FIELD.to_owned(), request)])), Some(approval.id.clone())))
}

/// What came back from a client that was asked by a result.
async fn answered(call: &Call, id: &str, ask: &Ask, answers: &InputResponses) -> Result<Word> {
    let answer: Option<ElicitResult> =
        answers.get(FIELD).and_then(|answer| serde_json::from_value(answer.clone()).ok());
    let answer = answer.ok_or_else(|| Error::new(Code::ApprovalRequired, "the answer to the question is missing"))?;
    decided(call, id, ask, &answer).await
}

/// Asks a client with a session, and waits for the person.
async fn elicited(
    call: &Call,
    context: &RequestContext<RoleServer>,
    words: &str,
    approval: &Approval,
    ask: &Ask,
) -> Result<Word> {
    let asked = context.peer.create_elicitation_with_timeout(form(words)?, Some(APPROVAL_LIFETIME));
    let answer = call.unless_cancelled(async { Ok(asked.await) }).await?;
    match answer {
        Ok(answer) => decided(call, &approval.id, ask, &answer).await,
        // It says that it can ask, and cannot: the user can still say yes by hand.
        Err(error) => {
            tracing::warn!("the client could not ask its user: {error}");
            Err(by_hand(call, approval, ask))
        }
    }
}

/// A person has decided; the word is used up at once.
async fn decided(call: &Call, id: &str, ask: &Ask, answer: &ElicitResult) -> Result<Word> {
    let nido = Arc::clone(call.app.unsettled());
    let yes = answer.content.as_ref().is_some_and(|content| content[FIELD] == true);
    let agent = call.who.agent.as_deref().map_or_else(|| "a client".into(), crate::answer::plain);
    let by = format!("{} through {agent}", call.who.actor);
    match answer.action {
        ElicitationAction::Accept if yes => {
            // Whose it is, and for what, is looked at before anything is decided.
            if nido.approval(id)?.actor != ask.actor {
                return Err(Error::new(Code::Denied, "that approval is for another caller"));
            }
            nido.approve(id, &by)?;
            use_up(call, id, ask)?;
            Ok(Word::Go("confirmed"))
        }
        _ => {
            if nido.approval(id)?.actor == ask.actor {
                nido.deny(id, &by)?;
            }
            Err(refused(call))
        }
    }
}

/// Uses an approval up. What is denied here a person can still decide, so it is told differently from what the server forbids.
fn use_up(call: &Call, id: &str, ask: &Ask) -> Result<()> {
    let nido = call.app.unsettled();
    nido.approval_use(id, ask).map_err(|error| {
        if error.code() != Code::Denied {
            return error;
        }
        match nido.approval(id) {
            Ok(approval) if said_no(&approval, ask) => refused(call),
            _ => {
                call.next_step("call again without approval_id, so that the user is asked about exactly this");
                error
            }
        }
    })
}

/// Whether this caller has had a no about this VM. Pure.
fn said_no(approval: &Approval, ask: &Ask) -> bool {
    approval.state == ApprovalState::Denied && (&approval.actor, &approval.vm_id) == (&ask.actor, &ask.vm_id)
}

/// What a model is told when a person has said no: just now, or a while ago.
fn refused(call: &Call) -> Error {
    call.next_step("the user has refused: do not try it again, nor in another way, unless they ask for it");
    Error::new(Code::Denied, "the user said no").hint("ask the user what to do instead")
}

/// For clients that cannot ask their user.
fn by_hand(call: &Call, approval: &Approval, ask: &Ask) -> Error {
    call.needs_approval(&approval.id);
    let words = format!("a person has to approve this for VM '{}' first", ask.vm_name);
    Error::new(Code::ApprovalRequired, words).hint(format!(
        "ask the user to run, within two minutes: nido approve {id}; then call again with the same arguments and approval_id \
         {id}",
        id = approval.id
    ))
}
