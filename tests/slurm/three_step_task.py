"""A task of three steps; each prompt begins with the step's line, yield and place in it."""

from dispatcher.taskmanager.backend.request import Request
from dispatcher.taskmanager.task import GeneratorTask
from tests.faults.step_tasks import Steps, text_of

STEPS = 3
_SHOWN_CHARACTERS = 60


class ThreeStepTask(GeneratorTask):
    """Asks three times, each time about the answer before."""

    def task_generator(self) -> Steps:
        """Ask one after the other."""
        answers = [str(self.data["text"])]
        for number in range(STEPS):
            prompt = f"{self.data['id']} {number} 0 {answers[-1][:_SHOWN_CHARACTERS]}"
            response = yield Request({"messages": [{"role": "user", "content": prompt}]})
            answers.append(text_of(response))
        return {"id": self.data["id"], "answers": answers[1:]}
