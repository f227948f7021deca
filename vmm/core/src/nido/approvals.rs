//! Approvals: asked for by a server, given by a person, used up by the operation they were given for.
//!
//! ```text
//!  server: approval_ask --> pending --person: approve--> approved --server: approval_use--> used
//!                              |                             |
//!                              +------person: deny-----------+--> denied        two minutes --> expired
//! ```

use nido_api::error::{Code, Error, Hint, Result};
use nido_api::{Approval, ApprovalList, ApprovalRequest, ApprovalState};
use nido_files::random;
use nido_store::ApprovalRow;

use super::Nido;

/// How often the same request is shown again after a person has denied it in a form.
const DENIALS_IN_FORMS_MAX: i64 = 3;

impl Nido {
    /// Asks for approval. While one for exactly this is open, whether a person has decided or not, that is the answer.
    ///
    /// # Errors
    /// `limit_exceeded` if the caller waits for too many.
    pub fn approval_request(&self, ask: &ApprovalRequest) -> Result<Approval> {
        let id = format!("apr_{}", random::id()?);
        self.store().request_approval(&id, ask)
    }

    /// The same where a form is shown: a no there is not the end at once.
    ///
    /// # Errors
    /// As [`Self::approval_request`].
    pub fn approval_request_in_form(&self, ask: &ApprovalRequest) -> Result<Approval> {
        let id = format!("apr_{}", random::id()?);
        self.store().request_approval_again(&id, ask, DENIALS_IN_FORMS_MAX)
    }

    /// Those that wait, and those of the last hour.
    ///
    /// # Errors
    /// Of the store.
    pub fn approvals(&self) -> Result<ApprovalList> {
        let mut approvals = self.store().approvals()?;
        approvals.sort_by_key(|approval| approval.state != ApprovalState::Pending);
        Ok(ApprovalList { approvals })
    }

    /// One of them.
    ///
    /// # Errors
    /// `approval_not_found`.
    pub fn approval(&self, id: &str) -> Result<Approval> {
        let found = self.store().approval(id)?;
        found.map(|row| row.approval).ok_or_else(|| {
            Error::new(Code::ApprovalNotFound, format!("there is no approval '{}'", id.escape_debug()))
                .hint(Hint::host("list them: nido approvals"))
        })
    }

    /// A person approves it. A second approval changes nothing.
    ///
    /// # Errors
    /// `approval_not_found`; `approval_ended` if it was denied or used, or its time is over.
    pub fn approve(&self, id: &str, by: &str) -> Result<Approval> {
        self.decide(id, by, true)
    }

    /// A person denies an operation, or revokes an approval that was not used yet.
    ///
    /// # Errors
    /// `approval_not_found`; `approval_ended` if it was used, or its time is over.
    pub fn deny(&self, id: &str, by: &str) -> Result<Approval> {
        self.decide(id, by, false)
    }

    fn decide(&self, id: &str, by: &str, yes: bool) -> Result<Approval> {
        let decided = self.store().decide_approval(id, yes, by)?;
        let now = self.approval(id)?;
        let wanted = if yes { ApprovalState::Approved } else { ApprovalState::Denied };
        if decided || now.state == wanted {
            return Ok(now);
        }
        let error =
            Error::new(Code::ApprovalEnded, format!("approval {id} is no longer valid: {}", how_it_ended(now.state)));
        Err(error.hint("the program must request the operation again"))
    }

    /// Uses an approval up for exactly what it was given for. Where this fails the operation must not be done; where it
    /// succeeds, nothing else can be done with it.
    ///
    /// # Errors
    /// `approval_required` if there is no valid one; `denied` if a person denied it, or it is for another operation.
    pub fn approval_use(&self, id: &str, ask: &ApprovalRequest) -> Result<()> {
        if self.store().use_approval(id, ask)? {
            return Ok(());
        }
        let row = self.store().approval(id)?;
        Err(why_not(id, row.as_ref(), ask))
    }
}

fn how_it_ended(state: ApprovalState) -> &'static str {
    match state {
        ApprovalState::Denied => "it was denied",
        ApprovalState::Used => "it was used",
        ApprovalState::Expired | ApprovalState::Pending | ApprovalState::Approved => "it expired",
    }
}

/// Why an approval cannot be used. Pure. Checks what it is bound to first, so that a caller learns nothing about approvals of other callers.
fn why_not(id: &str, row: Option<&ApprovalRow>, ask: &ApprovalRequest) -> Error {
    let again = "request it again without approval_id";
    let Some(ApprovalRow { approval, digest }) = row else {
        let words = format!("there is no approval '{}'", id.escape_debug());
        return Error::new(Code::ApprovalRequired, words).hint(again);
    };
    let other = [
        (approval.actor != ask.actor, "another caller"),
        (approval.tool != ask.tool, "another operation"),
        (approval.vm_id != ask.vm_id, "another VM, even if it had the same name"),
        (*digest != ask.digest(), "other arguments"),
    ];
    if let Some((_, what)) = other.into_iter().find(|(differs, _)| *differs) {
        return Error::new(Code::Denied, format!("approval {id} is for {what}")).hint(again);
    }
    match approval.state {
        ApprovalState::Denied => Error::new(Code::Denied, format!("the user denied this ({id})"))
            .hint("do not try again; ask the user what to do instead"),
        ApprovalState::Pending => Error::new(Code::ApprovalRequired, format!("approval {id} is pending"))
            .hint(Hint::host(format!("run nido approve {id}"))),
        over => Error::new(Code::ApprovalRequired, format!("approval {id} is no longer valid: {}", how_it_ended(over)))
            .hint(again),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::nido::OpenOptions;

    fn home() -> (tempfile::TempDir, Nido) {
        let dir = tempfile::tempdir().unwrap();
        let home = Some(dir.path().join("home"));
        let nido = Nido::open_unreconciled(OpenOptions { home, ..OpenOptions::default() }).unwrap();
        (dir, nido)
    }

    fn request() -> ApprovalRequest {
        ApprovalRequest {
            tool: "vm_restore".into(),
            vm_id: "1".into(),
            vm_name: "web".parse().unwrap(),
            actor: "uid:1000".into(),
            agent: None,
            arguments: json!({ "name": "web", "snapshot": "clean" }),
        }
    }

    #[test]
    fn an_approval_is_valid_for_one_use_of_its_request() {
        let (_dir, nido) = home();
        let asked = nido.approval_request(&request()).unwrap();
        let refused = |id: &str, ask: &ApprovalRequest| {
            let error = nido.approval_use(id, ask).unwrap_err();
            (error.code(), error.message().to_owned())
        };
        assert_eq!(refused("apr_none", &request()).0, Code::ApprovalRequired);
        let (code, words) = refused(&asked.id, &request());
        assert!(code == Code::ApprovalRequired && words.contains("is pending"), "{words}");
        nido.approve(&asked.id, "uid:0").unwrap();
        for (other, what) in [
            (ApprovalRequest { vm_id: "2".into(), ..request() }, "another VM"),
            (ApprovalRequest { actor: "token:ci".into(), ..request() }, "another caller"),
            (ApprovalRequest { tool: "vm_delete".into(), ..request() }, "another operation"),
            (
                ApprovalRequest { arguments: json!({ "name": "web", "snapshot": "other" }), ..request() },
                "other arguments",
            ),
        ] {
            let (code, words) = refused(&asked.id, &other);
            assert!(code == Code::Denied && words.contains(what), "{words}");
        }
        let with_id = json!({ "snapshot": "clean", "name": "web", "approval_id": asked.id });
        nido.approval_use(&asked.id, &ApprovalRequest { arguments: with_id, ..request() }).unwrap();
        let (code, words) = refused(&asked.id, &request());
        assert!(code == Code::ApprovalRequired && words.contains("it was used"), "{words}");
        assert_eq!(nido.approve(&asked.id, "uid:0").unwrap_err().code(), Code::ApprovalEnded);
        assert_eq!(nido.deny(&asked.id, "uid:0").unwrap_err().code(), Code::ApprovalEnded);
    }

    #[test]
    fn a_no_is_final_and_a_yes_can_be_taken_back() {
        let (_dir, nido) = home();
        let id = nido.approval_request(&request()).unwrap().id;
        nido.approve(&id, "uid:0").unwrap();
        assert_eq!(nido.approve(&id, "uid:5").unwrap().decided_by.as_deref(), Some("uid:0"), "the first word counts");
        let taken_back = nido.deny(&id, "uid:5").unwrap();
        assert_eq!((taken_back.state, taken_back.decided_by.as_deref()), (ApprovalState::Denied, Some("uid:5")));
        let error = nido.approval_use(&id, &request()).unwrap_err();
        assert_eq!(error.code(), Code::Denied);
        assert_eq!(nido.approve(&id, "uid:0").unwrap_err().code(), Code::ApprovalEnded);
        assert_eq!(nido.approve("apr_none", "uid:0").unwrap_err().code(), Code::ApprovalNotFound);
    }

    #[test]
    fn pending_approvals_are_listed_first() {
        let (_dir, nido) = home();
        let first = nido.approval_request(&request()).unwrap().id;
        let second = nido.approval_request(&ApprovalRequest { vm_id: "2".into(), ..request() }).unwrap().id;
        let ids = || nido.approvals().unwrap().approvals.into_iter().map(|approval| approval.id).collect::<Vec<_>>();
        assert_eq!(ids(), [&*second, &*first]);
        nido.approve(&second, "uid:0").unwrap();
        assert_eq!(ids(), [&*first, &*second]);
    }
}
