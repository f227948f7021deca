//! A person's confirmation, before something is done that the policy asks about (`policy/confirm.rs`).
//!
//! ```text
//!  not asked about, or it is the caller's own ephemeral VM ──────────────────────────────> go, and recorded
//!  it would fail anyway (`Operation::admit`: state, policy, limits, paths) ──────────────> error, without a confirmation
//!  approval_id, or the answer to a form that was given out ──> used up ───────────────────> go
//!  else an approval is requested:
//!    a client without `initialize` that shows forms ──> input_required, with a secret as state
//!    one with `initialize` that shows forms ──> elicitation/create ──> used up ───────────> go
//!        no answer in time ──> approval_required, and an approval in the form is still valid
//!    any other ──> approval_required: the user runs `nido approve ID`, the model calls again with approval_id
//! ```
//!
//! An approval is bound to the VM's id, the caller, the tool and a digest of the arguments; it is valid for two minutes and for
//! one use. The approved operation continues with that id: if the name is another VM's when the core looks, nothing is done.
//!
//! Invariants: what a model can fill in by itself never counts as consent; what cannot be found out is not done.

mod form;
mod question;

use std::sync::Arc;
use std::time::Duration;

use nido_api::error::{Code, Error, Hint, Result};
use nido_api::name::VmName;
use nido_api::{APPROVAL_LIFETIME, Approval, ApprovalRequest, ApprovalState, VmInfo};
use nido_core::policy::{Confirm, Facts, is_usual};
use rmcp::RoleServer;
use rmcp::model::{ElicitResult, InputRequiredResult, InputResponses, ProtocolVersion};
use rmcp::service::RequestContext;
use serde_json::Value;
use tokio::sync::oneshot;

use self::form::{FIELD, FormAnswer, form, form_answer, form_result, shows_forms};
use self::question::question;
use crate::answer::plain;
use crate::call_context::CallContext;
use crate::tools::{APPROVAL_ID, Operation, Tool};

/// How often a client is notified that its user has not responded yet.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(5);
/// How a VM is called in an approval that has no name before it is created.
const NEW_VM: &str = "new";

/// What a retry of a client without sessions brings along.
#[derive(Debug, Default)]
pub struct Retry {
    pub answers: Option<InputResponses>,
    pub state: Option<String>,
}

/// The decision about a call.
#[derive(Debug)]
pub enum Decision {
    /// Continue.
    Proceed(Permission),
    /// Ask the user first.
    Ask(Box<InputRequiredResult>),
}

/// Permission to carry the call out, and on which VM.
#[derive(Debug, Default)]
pub struct Permission {
    /// Why, for the audit log.
    pub word: &'static str,
    /// The id of the only VM that it may be done to, if that was looked at.
    pub vm: Option<String>,
}

/// A call that a person may have to confirm.
#[derive(Debug, Clone, Copy)]
pub struct PendingCall<'a> {
    pub tool: &'a Tool,
    pub operation: &'a dyn Operation,
    /// As they were read: what an approval is bound to.
    pub arguments: &'a Value,
}

/// Whether it may be done now.
pub async fn confirm(
    call: &mut CallContext,
    asked_for: PendingCall<'_>,
    retry: Retry,
    context: &RequestContext<RoleServer>,
) -> Result<Decision> {
    let PendingCall { tool, operation, arguments } = asked_for;
    let policy = &call.app.settings().policy.confirm;
    if operation.only_reads() {
        return Ok(Decision::Proceed(Permission::default()));
    }
    if !policy.concerns(tool.name()) && (*policy != Confirm::Never || !Confirm::Always.concerns(tool.name())) {
        return Ok(Decision::Proceed(Permission::default()));
    }
    let (name, vm, owner) = match subject(call, asked_for).await {
        Ok(subject) => subject,
        // The operation reports it. It must not reach a VM that gets the name meanwhile.
        Err(error) if error.code() == Code::VmNotFound => {
            return Ok(Decision::Proceed(Permission { word: "", vm: Some(String::new()) }));
        }
        Err(error) => return Err(error),
    };
    let own = owner.as_deref() == Some(call.who.owner().as_str());
    let facts = Facts {
        tool: tool.name(),
        foreign: vm.is_some() && !own,
        ephemeral: vm.as_ref().is_some_and(|vm| vm.ephemeral),
        overwrites: operation.overwrites(call),
        widens: operation.widens(call).await?,
    };
    let id = vm.as_ref().map(|vm| vm.id.clone());
    let go = |word, id| Ok(Decision::Proceed(Permission { word, vm: id }));
    if !policy.requires_confirmation(&facts) {
        let left_out = *policy == Confirm::Never && is_usual(&facts);
        return go(if left_out { "confirm_never" } else { "" }, id);
    }
    let goes_anyway = matches!(tool.name(), "vm_delete" | "vm_restore" | "vm_stop");
    if goes_anyway && facts.ephemeral && id.as_ref().is_some_and(|id| call.app.made(&call.who.actor, id)) {
        return go("own_ephemeral", id);
    }
    call.decided_about(id.clone());
    operation.admit(call).await?;
    let ask = ApprovalRequest {
        tool: tool.name().into(),
        vm_id: id.unwrap_or_default(),
        vm_name: name,
        actor: call.who.actor.clone(),
        agent: call.who.agent.clone(),
        arguments: arguments.clone(),
    };
    let words = question(call, tool, &ask, vm.as_ref()).await;
    request_confirmation(call, words, &ask, retry, context).await
}

/// The VM that a call acts on, and its owner; of one that is to be created only the name.
async fn subject(call: &CallContext, asked: PendingCall<'_>) -> Result<(VmName, Option<VmInfo>, Option<String>)> {
    let PendingCall { tool, operation, .. } = asked;
    let nido = call.nido().await?;
    let Some(name) = operation.vm() else {
        let words = format!("{} cannot be confirmed, and the policy wants that", tool.name());
        let name = operation.creates_vm().then(|| NEW_VM.parse()).transpose()?;
        return name.map(|name| (name, None, None)).ok_or_else(|| Error::new(Code::Denied, words));
    };
    match nido.info(name).await {
        Err(error) if error.code() == Code::VmNotFound && operation.creates_vm() => Ok((name.clone(), None, None)),
        found => Ok((name.clone(), Some(found?), nido.owner(name)?)),
    }
}

/// The same for operations that a person must confirm.
async fn request_confirmation(
    call: &CallContext,
    words: String,
    ask: &ApprovalRequest,
    retry: Retry,
    context: &RequestContext<RoleServer>,
) -> Result<Decision> {
    let vm = Some(ask.vm_id.clone()).filter(|id| !id.is_empty());
    let go = |word| Ok(Decision::Proceed(Permission { word, vm: vm.clone() }));
    if let Some(id) = ask.arguments.get(APPROVAL_ID).and_then(Value::as_str) {
        use_up(call, id, ask)?;
        return go("approved");
    }
    let shows_forms = context.client_capabilities().is_some_and(|client| shows_forms(&client));
    let by_result = shows_forms && is_modern(context);
    // A response to an unknown form is ignored: the confirmation is requested again.
    if let (true, Some(answers), Some(secret)) = (by_result, &retry.answers, &retry.state)
        && let Some(id) = call.app.open_forms().approval_of(secret)
    {
        answered(call, &id, ask, answers)?;
        return go("confirmed");
    }
    let nido = call.nido().await?;
    let approval = if shows_forms { nido.approval_request_in_form(ask)? } else { nido.approval_request(ask)? };
    if approval.state != ApprovalState::Pending {
        // The user was quicker than the model.
        use_up(call, &approval.id, ask)?;
        return go("approved");
    }
    if by_result {
        let secret = call.app.open_forms().open(&approval.id)?;
        return Ok(Decision::Ask(Box::new(form_result(&words, secret)?)));
    }
    if shows_forms {
        elicited(call, context, &words, &approval, ask).await?;
        return go("confirmed");
    }
    Err(by_hand(call, &approval.id, ask))
}

/// Whether a request is complete, in the protocol without `initialize`.
pub fn is_modern(context: &RequestContext<RoleServer>) -> bool {
    context.protocol_version().is_some_and(|version| version.as_str() >= ProtocolVersion::V_2026_07_28.as_str())
}

/// What came back from a client that was asked by a result.
fn answered(call: &CallContext, id: &str, ask: &ApprovalRequest, answers: &InputResponses) -> Result<()> {
    let answer: Option<ElicitResult> =
        answers.get(FIELD).and_then(|answer| serde_json::from_value(answer.clone()).ok());
    let answer = answer.ok_or_else(|| Error::new(Code::ApprovalRequired, "the answer to the question is missing"))?;
    decided(call, id, ask, &answer)
}

/// Requests the confirmation from a client with a session, and waits as long as the client waits for a result. Then the form is still open, and an approval
/// in it is equivalent to one by hand.
async fn elicited(
    call: &CallContext,
    context: &RequestContext<RoleServer>,
    words: &str,
    approval: &Approval,
    ask: &ApprovalRequest,
) -> Result<()> {
    let (peer, form) = (context.peer.clone(), form(words)?);
    let (tell, mut heard) = oneshot::channel();
    let (late, id, cancelled) = (call.clone(), approval.id.clone(), call.cancelled.clone());
    call.app.tasks().spawn(async move {
        let answer = tokio::select! {
            answer = peer.create_elicitation_with_timeout(form, Some(APPROVAL_LIFETIME)) => answer,
            () = cancelled.cancelled() => return,
        };
        if let Err(Ok(answer)) = tell.send(answer)
            && let Err(error) = written(&late, &id, &answer)
        {
            tracing::warn!("{}", plain(error.message()));
        }
    });
    let began = tokio::time::Instant::now();
    let mut still = tokio::time::interval_at(began + PROGRESS_INTERVAL, PROGRESS_INTERVAL);
    let patience = tokio::time::sleep(call.app.settings().answer_within);
    let mut patience = std::pin::pin!(patience);
    let mut asked = 0.0;
    loop {
        let answer = tokio::select! {
            answer = &mut heard => answer,
            _ = still.tick() => {
                // Less than what the work itself reports.
                asked += 0.01;
                call.progress.report(asked, None, "waiting for the user's confirmation");
                continue;
            }
            () = &mut patience => {
                heard.close();
                return Err(by_hand(call, &approval.id, ask));
            }
            () = call.cancelled.cancelled() => return Err(Error::new(Code::Interrupted, "the call was cancelled")),
        };
        return match answer {
            Ok(Ok(answer)) => decided(call, &approval.id, ask, &answer),
            // It claims to support forms, and does not: the user can still approve by hand.
            Ok(Err(error)) => {
                tracing::warn!("the client could not ask its user: {error}");
                Err(by_hand(call, &approval.id, ask))
            }
            Err(_) => Err(by_hand(call, &approval.id, ask)),
        };
    }
}

/// Records what the user has answered, and returns it. Whose approval it is, is looked at before anything is decided.
fn written(call: &CallContext, id: &str, answer: &ElicitResult) -> Result<FormAnswer> {
    let nido = Arc::clone(call.app.unreconciled());
    let agent = call.who.agent.as_deref().map_or_else(|| "a client".into(), plain);
    let by = format!("{} through {agent}", call.who.actor);
    let given = form_answer(answer);
    if given != FormAnswer::Nothing && nido.approval(id)?.actor != call.who.actor {
        return Err(Error::new(Code::Denied, "that approval is for another caller"));
    }
    match given {
        FormAnswer::Yes => nido.approve(id, &by).map(drop)?,
        FormAnswer::No => nido.deny(id, &by).map(drop)?,
        FormAnswer::Nothing => {}
    }
    Ok(given)
}

/// A person has responded; an approval is used at once. Closing the form is not a response.
fn decided(call: &CallContext, id: &str, ask: &ApprovalRequest, answer: &ElicitResult) -> Result<()> {
    match written(call, id, answer)? {
        FormAnswer::Yes => use_up(call, id, ask),
        FormAnswer::No => Err(refused(call)),
        FormAnswer::Nothing => Err(by_hand(call, id, ask)),
    }
}

/// Uses an approval up. What is denied here a person can still decide, so it is reported differently from what the server forbids.
fn use_up(call: &CallContext, id: &str, ask: &ApprovalRequest) -> Result<()> {
    let nido = call.app.unreconciled();
    nido.approval_use(id, ask).map_err(|error| {
        if error.code() != Code::Denied {
            return error;
        }
        match nido.approval(id) {
            Ok(approval) if is_denied(&approval, ask) => refused(call),
            _ => {
                call.next_step("call again without approval_id, so that the user is asked about exactly this");
                error
            }
        }
    })
}

/// Whether this caller has had a no about this VM. Pure.
fn is_denied(approval: &Approval, ask: &ApprovalRequest) -> bool {
    approval.state == ApprovalState::Denied && (&approval.actor, &approval.vm_id) == (&ask.actor, &ask.vm_id)
}

/// What a model gets when a person has denied the operation: just now, or a while ago.
fn refused(call: &CallContext) -> Error {
    call.next_step("the user has refused: do not try it again, nor in another way, unless they ask for it");
    Error::new(Code::Denied, "the user denied it").hint("ask the user what to do instead")
}

/// For clients that cannot ask their user, or whose user has not answered.
fn by_hand(call: &CallContext, id: &str, ask: &ApprovalRequest) -> Error {
    call.needs_approval(id);
    let words = format!("a person has to approve this for VM '{}' first", ask.vm_name);
    Error::new(Code::ApprovalRequired, words).hint(Hint::host(format!(
        "answer the form if there is one, or to run in a terminal, within two minutes: nido approve {id}; then call again \
         with exactly the same arguments; approval_id {id} may be added"
    )))
}
